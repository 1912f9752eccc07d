"""A Milvus server as a retriever of lightning-fot: an index that lies on another machine."""

import os
import uuid
import weakref
from typing import Any

import numpy as np

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers import PerBankRetriever

URI = "MILVUS_URI"
PREFIX = "lightning_fot_"
SETTING = "model.memory.retriever.uri"
# Vectors of one insert: a message may have 64 MiB.
_BATCH = 8192
# A search may ask for so many, and so may one call hold queries.
_MOST = 16_384


class MilvusRetriever(PerBankRetriever):
    """One collection a bank, with an HNSW graph; keys that are not there yet are searched exactly on this side.

    Args:
        dim: As every retriever.
        banks: As every retriever.
        uri: Of the server; None takes the environment's MILVUS_URI, or else ``http://127.0.0.1:19530``.
        token: That the server asks for, ``user:password``; None gives none.
        M: Links of a key.
        ef_construction: Candidates while building.
        ef: Candidates while searching; it can change without a rebuild.
        timeout: Seconds that a call may take.
        **kwargs: As every retriever.
    """

    query_args = ("ef",)

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        *,
        uri: str | None = None,
        token: str | None = None,
        M: int = 16,
        ef_construction: int = 200,
        ef: int = 128,
        timeout: float = 120.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, banks, **kwargs)
        self.uri = uri or os.environ.get(URI) or "http://127.0.0.1:19530"
        self.token, self.timeout = token, timeout
        self.M, self.ef_construction, self.ef = M, ef_construction, ef

    def new_index(self, dim: int) -> "MilvusIndex":
        """An empty collection.

        Raises:
            SettingError: Nobody answers at ``uri``.
        """
        return MilvusIndex(self._client(), dim, self.M, self.ef_construction, self.timeout)

    def _client(self) -> Any:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise MissingLibraryError("pymilvus", "pip install pymilvus", "model.memory.retriever=milvus") from error
        try:
            return MilvusClient(self.uri, token=self.token or "", timeout=self.timeout)
        except Exception as error:
            # Anything: each transport has errors of its own.
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingError(
                SETTING, self.uri, f"no Milvus server answers there ({said})",
                f"Start one (milvus-server), or set uri or {URI}.",
            ) from error  # fmt: skip


class MilvusIndex:
    """A collection of its own, dropped when nobody asks it any more."""

    def __init__(self, client: Any, dim: int, links: int, ef_construction: int, timeout: float) -> None:
        from pymilvus import DataType

        self._client, self._timeout = client, timeout
        self._name = f"{PREFIX}{uuid.uuid4().hex}"
        self._size = 0
        self.ef = 1  # set before each search
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("key", DataType.FLOAT_VECTOR, dim=dim)
        index = client.prepare_index_params()
        params = {"M": links, "efConstruction": ef_construction}
        index.add_index("key", index_type="HNSW", metric_type="L2", params=params)
        # Session: a search sees all that this process has inserted, and waits for nothing else.
        client.create_collection(
            self._name, schema=schema, index_params=index, consistency_level="Session", timeout=timeout
        )
        self._drop = weakref.finalize(self, _drop, client, self._name)

    def add(self, keys: np.ndarray) -> None:
        for start in range(0, len(keys), _BATCH):
            part = keys[start : start + _BATCH]
            rows = [{"row": self._size + place, "key": key} for place, key in enumerate(part)]
            self._client.insert(self._name, rows, timeout=self._timeout)
            self._size += len(part)
        # No flush: a server allows one in ten seconds (quotaAndLimits.flushRate). It seals what was inserted by itself,
        # builds the graph while searches go on, and scans until then.

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        wanted = min(k, _MOST)
        how = {"metric_type": "L2", "params": {"ef": max(self.ef, wanted)}}
        for start in range(0, len(queries), _MOST):
            part = queries[start : start + _MOST]
            found = self._client.search(
                self._name, data=list(part), anns_field="key", limit=wanted, search_params=how, timeout=self._timeout
            )
            for place, hits in enumerate(found, start):
                rows[place, : len(hits)] = [hit["row"] if "row" in hit else hit["id"] for hit in hits]
        return rows


def _drop(client: Any, name: str) -> None:
    """Removes a collection; a server that is gone has nothing to remove."""
    try:
        client.drop_collection(name, timeout=10.0)
    except Exception:
        return
