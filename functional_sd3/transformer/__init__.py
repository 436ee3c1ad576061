"""The velocity network."""
