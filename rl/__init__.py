"""The reinforcement-learning loop: data, rewards, advantages, loss, trainer, checkpoints."""
