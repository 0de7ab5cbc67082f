"""Nearest neighbours, re-ranking, graphs, matching of texts."""
