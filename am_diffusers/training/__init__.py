"""The loop, its state and its records: optimizer, checkpoints, metrics, trackers."""
