"""Metrics of image quality, diversity and prompt alignment."""
