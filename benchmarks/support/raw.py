"""The libraries behind the built-in retrievers, called directly, on the very vectors that a retriever hands to them.

Each is imported where it is used: not every system has all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers import FaissIVFRetriever, HNSWRetriever, Index, PerBankRetriever, ScannRetriever

Vectors = NDArray[np.float32]
CLASSES: dict[str, type[PerBankRetriever]] = {
    "hnsw": HNSWRetriever,
    "faiss_ivf": FaissIVFRetriever,
    "scann": ScannRetriever,
}


class Overheard:
    """A built-in retriever class whose indexes tell what they are given.

    Args:
        name: Of the retriever.

    Attributes:
        kind: The class.
        added: Transformed keys of each ``add``.
        asked: Transformed queries of each ``search``.
    """

    def __init__(self, name: str) -> None:
        self.added: list[Vectors] = []
        self.asked: list[Vectors] = []
        self.indexes: list[Any] = []
        overheard = self

        class Listening(CLASSES[name]):  # type: ignore[misc]
            def new_index(self, dim: int) -> Index:
                index: Any = super().new_index(dim)
                overheard.indexes.append(index)
                for method, heard in (("add", overheard.added), ("search", overheard.asked)):
                    setattr(index, method, _noting(getattr(index, method), heard))
                return index

        self.kind = Listening

    def stop(self) -> None:
        """Listen no longer: nothing stands between a retriever and its index while it is timed."""
        for index in self.indexes:
            del index.add, index.search


def _noting(call: Callable[..., Any], heard: list[Vectors]) -> Callable[..., Any]:
    def noting(vectors: Vectors, *rest: Any) -> Any:
        heard.append(np.array(vectors))
        return call(vectors, *rest)

    return noting


class RawHNSW:
    """hnswlib. ``l2`` space: the vectors are augmented to one norm."""

    def __init__(self, keys: Vectors, threads: int, M: int, ef_construction: int, ef_search: int) -> None:
        import hnswlib

        self.index: Any = hnswlib.Index(space="l2", dim=keys.shape[1])
        self.index.init_index(max_elements=len(keys), M=M, ef_construction=ef_construction, random_seed=0)
        self.index.add_items(keys, num_threads=threads)
        self.index.set_ef(ef_search)

    def search(self, queries: Vectors, k: int, threads: int) -> Any:
        """Rows (q, k)."""
        return self.index.knn_query(queries, k=k, num_threads=threads)[0]


class RawFaiss:
    """IndexIVFFlat: cells of plain k-means, those of largest inner product scanned."""

    def __init__(self, keys: Vectors, threads: int, nlist: int, nprobe: int) -> None:
        import faiss

        self.faiss: Any = faiss
        faiss.omp_set_num_threads(threads)
        dim = keys.shape[1]
        self.cells: Any = faiss.IndexFlatL2(dim)
        self.index: Any = faiss.IndexIVFFlat(self.cells, dim, nlist, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.spherical = False
        self.index.cp.seed, self.index.cp.niter = 1, 10
        self.index.train(keys)
        self.index.add(keys)
        # Keys lie in their nearest cells; the quantizer that chooses cells for a query compares inner products.
        self.chooser: Any = faiss.IndexFlatIP(dim)
        self.chooser.add(self.cells.reconstruct_n(0, nlist))
        self.index.quantizer = self.chooser
        self.index.nprobe = nprobe

    def search(self, queries: Vectors, k: int, threads: int) -> Any:
        """Rows (q, k)."""
        if self.faiss.omp_get_max_threads() != threads:
            self.faiss.omp_set_num_threads(threads)
        return self.index.search(queries, k)[1]


class RawScann:
    """A ScaNN tree with anisotropic quantisation and reordering."""

    def __init__(self, keys: Vectors, threads: int, num_leaves: int, num_leaves_to_search: int, reorder: int) -> None:
        import scann

        builder = scann.scann_ops_pybind.builder(keys, 32, "dot_product")
        builder = builder.tree(num_leaves, num_leaves_to_search, training_sample_size=len(keys))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2, training_sample_size=len(keys))
        self.searcher: Any = builder.reorder(reorder).set_n_training_threads(threads).build()

    def search(self, queries: Vectors, k: int, threads: int) -> Any:
        """Rows (q, k)."""
        search = self.searcher.search_batched if threads == 1 else self.searcher.search_batched_parallel
        return search(queries, final_num_neighbors=k)[0]


RAW: dict[str, Callable[..., Any]] = {"hnsw": RawHNSW, "faiss_ivf": RawFaiss, "scann": RawScann}


def as_rows(found: Any) -> Tensor:
    """Row numbers of a library as (q, k) int64."""
    return torch.from_numpy(np.asarray(found).astype(np.int64))
