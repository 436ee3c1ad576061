"""Foundations of every package: keys, trees, specs, layers, attention, transforms, dispatch."""
