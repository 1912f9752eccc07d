"""The verbs of the command line: one verb, one file; words in, exit code out."""
