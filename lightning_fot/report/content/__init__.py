"""What a page says: numbers, sentences, tables, curves."""
