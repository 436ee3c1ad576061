"""Whole recipes: data, model, stages of training and report."""
