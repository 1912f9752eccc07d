"""What tasks are made of: episodes with questions, samples, pieces of text, held-out texts."""
