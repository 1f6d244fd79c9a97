"""Drafters: whatever proposes tokens. A drafter only proposes; the policy verifies."""
