"""usearch's HNSW graphs as a retriever of lightning-fot: all that a plug-in has to be."""

from typing import Any

import numpy as np

from lightning_fot.retrievers import PerBankRetriever


class UsearchRetriever(PerBankRetriever):
    """One usearch graph a bank: ``connectivity`` links a key, ``expansion_search`` candidates while searching."""

    query_args = ("expansion_search",)

    def __init__(
        self, dim: int, banks: int = 1, *, connectivity: int = 16, expansion_search: int = 128, **kwargs: Any
    ) -> None:
        super().__init__(dim, banks, **kwargs)
        self.connectivity, self.expansion_search = connectivity, expansion_search

    def new_index(self, dim: int) -> "UsearchIndex":
        return UsearchIndex(dim, self.connectivity, self.threads_for(4096))


class UsearchIndex:
    def __init__(self, dim: int, connectivity: int, threads: int) -> None:
        from usearch.index import Index

        self._index = Index(ndim=dim, metric="l2sq", dtype="f32", connectivity=connectivity, expansion_add=200)
        self._build_threads = threads
        self.expansion_search = self.threads = 1  # both are set before each search

    @property
    def nbytes(self) -> int:
        return int(self._index.memory_usage)

    def add(self, keys: np.ndarray) -> None:
        self._index.add(np.arange(len(self._index), len(self._index) + len(keys)), keys, threads=self._build_threads)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self._index.expansion_search = max(self.expansion_search, k)
        found = self._index.search(queries, k, threads=self.threads)
        if len(queries) == 1:  # a single query comes back without its first dimension
            return np.asarray(found.keys, dtype=np.int64).reshape(1, -1)
        rows = np.asarray(found.keys, dtype=np.int64)
        # Short results are padded with key 0: only the first counts[i] are real.
        return np.where(np.arange(k) < found.counts[:, None], rows, -1)
