"""Inverted lists over k-means cells (Jégou et al., 2011) by faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_fot.config.retriever import TransformSpec, check_value
from lightning_fot.retrievers.optional import require
from lightning_fot.retrievers.per_bank import Index, PerBankRetriever

_KEYS_A_CELL = 39  # below this faiss calls the training set too small
_TRAINED_A_CELL = 64  # keys that k-means looks at, and its rounds: more of either found no more neighbours
_ROUNDS = 5
_MOST_PROBES = 64
_HALF = 512.0


class FaissIVFRetriever(PerBankRetriever):
    """Cells of nearby keys; a search scans the cells that promise most. Quick to build and to extend.

    Cells are those of plain k-means on centred keys mapped by past queries (p = 1/2). The spherical k-means that faiss
    takes for inner products loses up to half of the neighbours on real keys.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        nlist: Cells; None takes about 6 sqrt(n), a power of two, of at least 39 keys each.
        nprobe: Cells scanned for a query; None takes nlist / 16, from 8 to 64: a fixed share of the cells would make
            searches of a long memory as slow as reading it.
        index_dtype: How the cells hold their keys: ``"float32"``, ``"float16"`` or ``"int8"`` (differences from a
            cell's centre in eight bits a coordinate), of four, two and one bytes. What is found is scored exactly.
        **kwargs: Those of :class:`Retriever`.

    Raises:
        SettingError: An argument is out of its range.
        MissingLibraryError: faiss is not installed.
    """

    query_args: ClassVar[tuple[str, ...]] = ("nprobe",)
    smallest_index: ClassVar[int] = _KEYS_A_CELL
    default_transform: ClassVar[TransformSpec] = TransformSpec(center=True, query_power=0.5)
    default_duplicate_distance: ClassVar[float] = 0.0
    cells: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        *,
        nlist: int | None = None,
        nprobe: int | None = None,
        index_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, banks, **kwargs)
        for name, value in (("nlist", nlist), ("nprobe", nprobe), ("index_dtype", index_dtype)):
            check_value(name, value)
        require("faiss", "faiss-cpu", "faiss_ivf")
        self.nlist = nlist
        self.nprobe = nprobe
        self.index_dtype = index_dtype

    def new_index(self, dim: int) -> Index:
        """Empty lists; the first keys added train the cells."""
        return _IVFIndex(self, dim)


class _IVFIndex:
    """One set of lists. Explicit constructors only: ``index_factory`` crashes when usearch was imported before."""

    def __init__(self, owner: FaissIVFRetriever, dim: int) -> None:
        self._faiss: Any = require("faiss", "faiss-cpu", "faiss_ivf")
        self._dim = dim
        self._nlist = owner.nlist
        self._dtype = owner.index_dtype
        self._seed = owner.seed
        self._l2 = owner.transform.l2_augment
        self._index: Any = None
        self._cells: Any = None
        self._chooser: Any = None
        # Half precision ends at 65,504: keys of larger coordinates are held, and asked for, smaller than they are.
        self._scale = np.float32(1)
        self._build_threads = owner.threads_for(1 << 30)
        self.nprobe = owner.nprobe
        self.threads = 1

    @property
    def nbytes(self) -> int:
        if self._index is None:
            return 0
        return int(self._index.ntotal * (self._index.code_size + 8) + self._index.nlist * 4 * self._dim)

    def train(self, keys: NDArray[np.float32], count: int) -> None:
        if self._dtype == "float16":
            top = float(np.abs(keys).max(initial=0))
            # Later keys may be longer, at most 64 times: those beyond are set apart.
            self._scale = np.float32(1 if top <= _HALF else 2.0 ** -math.ceil(math.log2(top / _HALF)))
            keys = keys * self._scale
        with _threads(self._faiss, self._build_threads):
            self._index = self._trained(keys, count)

    def add(self, keys: NDArray[np.float32]) -> None:
        if self._index is None:
            self.train(keys, len(keys))
        with _threads(self._faiss, self._build_threads):
            # Keys lie in L2 cells, but the cells that promise most are those of largest inner product.
            self._index.quantizer = self._cells
            self._index.add(keys if self._scale == 1 else keys * self._scale)
            if not self._l2:
                self._index.quantizer = self._chooser

    def _trained(self, keys: NDArray[np.float32], count: int) -> Any:
        faiss = self._faiss
        wanted = self._nlist or 2 ** round(math.log2(6 * math.sqrt(count)))
        nlist = max(1, min(wanted, len(keys) // _KEYS_A_CELL))
        metric = faiss.METRIC_L2 if self._l2 else faiss.METRIC_INNER_PRODUCT
        self._cells = faiss.IndexFlatL2(self._dim)
        if self._dtype == "float32":
            index = faiss.IndexIVFFlat(self._cells, self._dim, nlist, metric)
        else:
            code = faiss.ScalarQuantizer.QT_fp16 if self._dtype == "float16" else faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexIVFScalarQuantizer(self._cells, self._dim, nlist, code, metric)
        index.cp.spherical = False
        index.cp.seed = self._seed + 1
        index.cp.niter = _ROUNDS
        index.cp.max_points_per_centroid = _TRAINED_A_CELL
        index.train(keys)
        self._chooser = faiss.IndexFlatIP(self._dim)
        self._chooser.add(self._cells.reconstruct_n(0, nlist))
        return index

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        nlist = self._index.nlist
        self._index.nprobe = min(nlist, self.nprobe or min(_MOST_PROBES, max(8, nlist // 16)))
        if self._scale != 1:
            # Distances need both at one scale.
            queries = queries * self._scale
        with _threads(self._faiss, self.threads):
            _, rows = self._index.search(queries, k)
        return np.asarray(rows, dtype=np.int64)


@contextmanager
def _threads(faiss: Any, count: int) -> Iterator[None]:
    """Set faiss's OpenMP threads and put them back: torch shares the number."""
    before = faiss.omp_get_max_threads()
    if before != count:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            faiss.omp_set_num_threads(before)
