"""Classifiers from noisy web images."""
