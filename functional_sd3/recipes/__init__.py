"""Whole recipes: data, model, stages of training and report, each made of the other rooms."""
