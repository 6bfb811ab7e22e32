"""Data, metrics, checkpoints, the training loop, and trained networks applied to pictures."""
