"""Retrievers: which rows of a memory to attend to. Importing this package imports no torch; names load when used."""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names
from lightning_fot.config.retriever import TransformSpec as TransformSpec

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever as Retriever
    from lightning_fot.retrievers.exact import ExactRetriever as ExactRetriever
    from lightning_fot.retrievers.faiss_ivf import FaissIVFRetriever as FaissIVFRetriever
    from lightning_fot.retrievers.hnsw import HNSWRetriever as HNSWRetriever
    from lightning_fot.retrievers.keys.store import KeyStore as KeyStore
    from lightning_fot.retrievers.per_bank import Index as Index
    from lightning_fot.retrievers.per_bank import PerBankRetriever as PerBankRetriever
    from lightning_fot.retrievers.registry import RetrieverInfo as RetrieverInfo
    from lightning_fot.retrievers.registry import available_retrievers as available_retrievers
    from lightning_fot.retrievers.registry import check_retriever as check_retriever
    from lightning_fot.retrievers.registry import create_retriever as create_retriever
    from lightning_fot.retrievers.scann import ScannRetriever as ScannRetriever
    from lightning_fot.retrievers.stats import RetrieverStats as RetrieverStats

_HOME = {
    "ExactRetriever": "exact",
    "FaissIVFRetriever": "faiss_ivf",
    "HNSWRetriever": "hnsw",
    "Index": "per_bank",
    "KeyStore": "keys.store",
    "PerBankRetriever": "per_bank",
    "Retriever": "base",
    "RetrieverInfo": "registry",
    "RetrieverStats": "stats",
    "ScannRetriever": "scann",
    "available_retrievers": "registry",
    "check_retriever": "registry",
    "create_retriever": "registry",
}

__all__ = sorted([*_HOME, "TransformSpec"])

__getattr__, __dir__ = lazy_names(__name__, _HOME)
