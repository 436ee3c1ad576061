"""Foundations of every room: keys, trees, specs, layers, attention, transforms, dispatch."""
