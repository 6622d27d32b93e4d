"""Training: batches that never pad, a trainer that commits its checkpoints, and an audit that never sleeps."""
