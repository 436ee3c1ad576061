"""What everything is made of: keys, trees, specs, layers, attention, transforms."""
