"""Callbacks for any Trainer with a ``FocusedTransformer``: how well and how fast its memory is searched."""

from lightning_fot.callbacks.retrieval_recall import RetrievalRecall
from lightning_fot.callbacks.retrieval_speed import RetrievalSpeed

__all__ = ["RetrievalRecall", "RetrievalSpeed"]
