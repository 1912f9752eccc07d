"""Hooks on a transformers model, and taking them off again."""
