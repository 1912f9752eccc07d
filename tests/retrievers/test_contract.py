"""Every built-in retriever keeps the public contract."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_fot.testing import RetrieverContract


class TestExact(RetrieverContract):
    retriever = "exact"
    min_mass_recall = 0.9999


class TestHNSW(RetrieverContract):
    retriever = "hnsw"


class TestFaissIVF(RetrieverContract):
    retriever = "faiss_ivf"


class TestScann(RetrieverContract):
    retriever = "scann"


class TestHNSWWithArguments(RetrieverContract):
    retriever: ClassVar[dict[str, Any]] = {
        "name": "hnsw",
        "M": 24,
        "ef_search": 400,
        "transform": {"center": True, "l2_augment": True},
    }
