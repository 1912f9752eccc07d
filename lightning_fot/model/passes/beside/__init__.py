"""Texts side by side in one batch: their local windows in shared tensors, and what a layer does for all of them."""
