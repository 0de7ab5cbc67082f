"""What outlives a step: momentum encoder, queue."""
