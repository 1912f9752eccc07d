"""HNSW graphs (Malkov and Yashunin, arXiv 1603.09320) by hnswlib."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_fot.config.retriever import TransformSpec, check_value
from lightning_fot.retrievers.index.jobs import check_job
from lightning_fot.retrievers.optional import require
from lightning_fot.retrievers.per_bank import Index, PerBankRetriever

_STEP = 4096  # keys linked in between two looks whether the graph is still wanted


class HNSWRetriever(PerBankRetriever):
    """A navigable graph for each bank: the fewest keys visited at high recall, the slowest to build.

    Keys are centred, mapped by past queries (p = 1/4) and L2-augmented by default; a graph on raw inner products finds
    next to nothing, since the keys of a head share a large mean. Where text repeats itself, keys that are nearly the
    same are linked in once. A graph built by several threads differs from run to run; ``num_threads=1`` makes it
    repeatable.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        M: Links of a key in each layer of the graph.
        ef_construction: Candidates kept while a key is linked in.
        ef_search: Candidates kept while searching; at least k are.
        **kwargs: Those of :class:`Retriever`.

    Raises:
        SettingError: An argument is out of its range.
        MissingLibraryError: hnswlib is not installed.
    """

    query_args: ClassVar[tuple[str, ...]] = ("ef_search",)
    default_transform: ClassVar[TransformSpec] = TransformSpec(center=True, query_power=0.25, l2_augment=True)

    def __init__(
        self, dim: int, banks: int = 1, *, M: int = 16, ef_construction: int = 200, ef_search: int = 128, **kwargs: Any
    ) -> None:
        super().__init__(dim, banks, **kwargs)
        for name, value in (("M", M), ("ef_construction", ef_construction), ("ef_search", ef_search)):
            check_value(name, value)
        require("hnswlib", "hnswlib", "hnsw")
        self.M = M
        self.ef_construction = ef_construction
        self.ef_search = ef_search

    def new_index(self, dim: int) -> Index:
        """An empty graph."""
        return _HNSWIndex(self, dim)


class _HNSWIndex:
    """One graph; hnswlib wants its capacity beforehand, so it is resized by doubling."""

    def __init__(self, owner: HNSWRetriever, dim: int) -> None:
        hnswlib = require("hnswlib", "hnswlib", "hnsw")
        self._index: Any = hnswlib.Index(space="l2" if owner.transform.l2_augment else "ip", dim=dim)
        self._settings = {"M": owner.M, "ef_construction": owner.ef_construction, "random_seed": owner.seed}
        self._build_threads = owner.threads_for(1 << 30)
        self._capacity = 0
        self._size = 0
        self.ef_search = owner.ef_search
        self.threads = 1

    @property
    def nbytes(self) -> int:
        return int(self._index.index_file_size())

    def add(self, keys: NDArray[np.float32]) -> None:
        need = self._size + len(keys)
        if self._capacity == 0:
            # A bank is built anew when it has doubled. Room that nothing was written to takes no memory.
            self._capacity = 2 * need
            self._index.init_index(max_elements=self._capacity, **self._settings)
        elif need > self._capacity:
            self._capacity = max(need, 2 * self._capacity)
            self._index.resize_index(self._capacity)
        for start in range(0, len(keys), _STEP):
            check_job()
            part = keys[start : start + _STEP]
            rows = np.arange(self._size, self._size + len(part))
            self._index.add_items(part, rows, num_threads=self._build_threads)
            self._size += len(part)

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        ef = max(self.ef_search, k)
        while True:
            self._index.set_ef(ef)
            try:
                labels, _ = self._index.knn_query(queries, k=k, num_threads=self.threads)
                return np.asarray(labels).view(np.int64)
            except RuntimeError:
                # hnswlib refuses the whole batch when one query reaches fewer than k keys: look further.
                if ef >= self._size:
                    raise
                ef = min(4 * ef, self._size)
