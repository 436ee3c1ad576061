"""Optimisers, the training step and loop, data."""
