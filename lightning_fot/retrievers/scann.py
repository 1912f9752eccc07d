"""ScaNN: a k-means tree, anisotropic quantisation (Guo et al., arXiv 1908.10396) and exact reordering."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_fot.config.retriever import TransformSpec, check_value
from lightning_fot.retrievers.optional import require
from lightning_fot.retrievers.per_bank import Index, PerBankRetriever


class ScannRetriever(PerBankRetriever):
    """The fastest on large banks. Its tree is not extended: a bank is rebuilt when it has grown by half.

    Keys are centred and mapped by past queries (p = 1/2) by default. ScaNN takes no seed for its training:
    two trees over the same keys may differ in a few neighbours.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        num_leaves: Leaves of the tree; None takes about 1.5 sqrt(n), a power of two.
        num_leaves_to_search: Leaves scanned for a query; None takes num_leaves / 8, at least 16.
        reorder: Candidates rescored exactly; at least k are. None takes 256 or 4 k.
        **kwargs: Those of :class:`Retriever`.

    Raises:
        SettingError: An argument is out of its range.
        MissingLibraryError: scann is not installed.
    """

    query_args: ClassVar[tuple[str, ...]] = ("num_leaves_to_search", "reorder")
    incremental: ClassVar[bool] = False
    smallest_index: ClassVar[int] = 64
    default_transform: ClassVar[TransformSpec] = TransformSpec(center=True, query_power=0.5)
    default_duplicate_distance: ClassVar[float] = 0.0
    cells: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        *,
        num_leaves: int | None = None,
        num_leaves_to_search: int | None = None,
        reorder: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, banks, **kwargs)
        settings = (("num_leaves", num_leaves), ("num_leaves_to_search", num_leaves_to_search), ("reorder", reorder))
        for name, value in settings:
            check_value(name, value)
        require("scann", "scann", "scann")
        self.num_leaves = num_leaves
        self.num_leaves_to_search = num_leaves_to_search
        self.reorder = reorder

    def new_index(self, dim: int) -> Index:
        """An empty tree; the first keys added build it."""
        return _ScannIndex(self)


class _ScannIndex:
    """One tree. Searched through the plain searcher, whose neighbours are row numbers."""

    def __init__(self, owner: ScannRetriever) -> None:
        self._scann: Any = require("scann", "scann", "scann")
        self._num_leaves = owner.num_leaves
        self._metric = "squared_l2" if owner.transform.l2_augment else "dot_product"
        self._build_threads = owner.threads_for(1 << 30)
        self._searcher: Any = None
        self._leaves = 1
        self._size = 0
        self._dim = 0
        self.num_leaves_to_search = owner.num_leaves_to_search
        self.reorder = owner.reorder
        self.threads = 1

    @property
    def nbytes(self) -> int:
        # Two coordinates a code of 4 bits, the vectors kept for reordering, the centres.
        return self._size * (self._dim // 4 + 4 * self._dim) + self._leaves * 4 * self._dim

    def add(self, keys: NDArray[np.float32]) -> None:
        if self._searcher is not None:
            raise RuntimeError("a ScaNN tree is built once")
        self._size, self._dim = keys.shape
        wanted = self._num_leaves or 2 ** round(math.log2(1.5 * math.sqrt(self._size)))
        self._leaves = max(2, min(wanted, self._size // 4))
        builder = self._scann.scann_ops_pybind.builder(keys, 32, self._metric)
        builder = builder.tree(
            num_leaves=self._leaves, num_leaves_to_search=self._leaves, training_sample_size=self._size
        )
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=self._size)
        self._searcher = builder.reorder(256).set_n_training_threads(self._build_threads).build()

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        leaves = min(self._leaves, self.num_leaves_to_search or max(16, self._leaves // 8))
        reorder = min(self._size, max(k, self.reorder or max(256, 4 * k)))
        search = self._searcher.search_batched if self.threads == 1 else self._searcher.search_batched_parallel
        rows, distances = search(
            queries, final_num_neighbors=k, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves
        )
        if rows.shape[1] == k and not np.isnan(distances).any():
            answer: NDArray[np.int64] = rows.astype(np.int64)
            return answer
        found = np.full((len(queries), k), -1, dtype=np.int64)
        width = min(k, rows.shape[1])
        # Missing neighbours come as row 0 with a score of NaN.
        found[:, :width] = np.where(np.isnan(distances), -1, rows.astype(np.int64))[:, :width]
        return found
