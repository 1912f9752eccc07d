"""Holds vectors, and scans them."""
