"""Stable Diffusion 3.5 as composable pure functions over explicit parameter trees."""
