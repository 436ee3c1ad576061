"""Bytes on disk: what every reader of files shares. Nothing here knows a model."""
