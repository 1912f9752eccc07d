"""Rows of a batch: which window of which text stands where."""
