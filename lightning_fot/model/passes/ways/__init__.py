"""Ways of attending beside FoT's own, for comparison: one way a file, found by the file's name."""
