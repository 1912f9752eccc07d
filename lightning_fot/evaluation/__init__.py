"""What a memory is worth: perplexity and passkey with and without it, recall and speed of its index.

The names below load when first used: planning an evaluation and checking its documents need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fot.evaluation.evaluate import evaluate as evaluate
    from lightning_fot.evaluation.evaluate import summarise as summarise
    from lightning_fot.evaluation.plan import plan as plan
    from lightning_fot.evaluation.plan import select_documents as select_documents
    from lightning_fot.evaluation.retrieval import RetrievalQuality as RetrievalQuality
    from lightning_fot.evaluation.retrieval import SearchTimes as SearchTimes
    from lightning_fot.evaluation.retrieval import retrieval_quality as retrieval_quality

_HOME = {
    "RetrievalQuality": "retrieval",
    "SearchTimes": "retrieval",
    "evaluate": "evaluate",
    "plan": "plan",
    "retrieval_quality": "retrieval",
    "select_documents": "plan",
    "summarise": "evaluate",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
