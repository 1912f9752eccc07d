"""A named memory on disk: documents are read into it, questions are asked beside it."""
