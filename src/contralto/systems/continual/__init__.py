"""Learning one task after another, and keeping the earlier ones."""
