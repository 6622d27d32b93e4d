"""Training: batches without padding, a trainer with atomic checkpoints, and an audit of every run."""
