"""Finds documents and encodes them."""
