"""Eyes on a run: the terminal display."""
