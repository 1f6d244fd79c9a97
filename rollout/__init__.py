"""The rollout engine: paged KV, continuous batching, and speculation that cannot change a sample."""
