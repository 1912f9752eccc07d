"""What a memory is worth, measured: perplexity, pass keys, retrieval quality."""
