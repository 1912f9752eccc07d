"""What a memory is worth: perplexity and passkey with and without it, recall and speed of its index.

Nothing is imported here: :mod:`lightning_fot.evaluation.plan` plans an evaluation and checks its documents without
torch, :mod:`lightning_fot.evaluation.evaluate` does it.
"""
