"""Metrics and protocols, with intervals."""
