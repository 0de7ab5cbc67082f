"""Encoders from unlabelled pictures: one base, the systems on it, and the baselines that their claims need."""
