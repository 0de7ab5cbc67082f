"""The glue to Lightning: progress, checkpoints, resume."""
