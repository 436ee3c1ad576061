"""Rectified flow as an ordinary differential equation."""
