"""Weighted sources of training text."""
