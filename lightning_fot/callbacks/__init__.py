"""Callbacks for any Trainer with a ``FocusedTransformer``: search of its memory, attention to it, its size, a page."""

from lightning_fot.callbacks.memory_attention import MemoryAttention
from lightning_fot.callbacks.memory_size import MemorySize
from lightning_fot.callbacks.retrieval_recall import RetrievalRecall
from lightning_fot.callbacks.retrieval_speed import RetrievalSpeed
from lightning_fot.callbacks.run_report import RunReport

__all__ = ["MemoryAttention", "MemorySize", "RetrievalRecall", "RetrievalSpeed", "RunReport"]
