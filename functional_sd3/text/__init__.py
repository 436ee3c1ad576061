"""Prompt to tokens to embeddings."""
