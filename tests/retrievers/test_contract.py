"""Every built-in retriever keeps the public contract."""

from __future__ import annotations

from typing import ClassVar

from lightning_fot.testing import RetrieverContract


class TestExact(RetrieverContract):
    retriever = "exact"
    min_mass_recall = 0.9999


class TestHNSW(RetrieverContract):
    retriever = "hnsw"


class TestFaissIVF(RetrieverContract):
    retriever = "faiss_ivf"


class TestFaissIVFInt8(RetrieverContract):
    retriever: ClassVar = {"name": "faiss_ivf", "index_dtype": "int8"}


class TestScann(RetrieverContract):
    retriever = "scann"
    repeatable = False
