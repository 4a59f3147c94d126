"""Training: text as tokens, one loop, checkpoints that survive a kill, and `sentei train`."""
