"""Builds indexes, and asks them."""
