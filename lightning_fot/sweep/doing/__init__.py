"""How the cells of a sweep are done: here, one after the other, or as tasks of a Ray cluster, several at once."""
