"""A Hugging Face model with a memory."""
