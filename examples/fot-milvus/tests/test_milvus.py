"""The plug-in keeps the contract beside a real server, found by its name; and says so where there is no server."""

import gc
import socket
from typing import Any

import pytest
import torch
from fot_milvus import PREFIX, MilvusRetriever

from lightning_fot.errors import SettingError
from lightning_fot.retrievers import available_retrievers, create_retriever
from lightning_fot.testing import RetrieverContract, real_qk


class TestMilvus(RetrieverContract):
    retriever = MilvusRetriever
    # Segments are sealed, and graphs built, while searches go on.
    repeatable = False


def filled(count: int, **given: Any) -> Any:
    retriever = create_retriever(MilvusRetriever, dim=64, min_index_size=256, **given)
    retriever.add(real_qk()["L10h0"]["keys"][:, :count])
    retriever.flush()
    return retriever


def collections(retriever: Any) -> set[str]:
    return {name for name in retriever._client().list_collections() if name.startswith(PREFIX)}


def test_found_by_name_once_installed() -> None:
    if "milvus" not in available_retrievers():
        pytest.fail("fot-milvus is not installed: pip install ./examples/fot-milvus")
    assert isinstance(create_retriever("milvus", dim=8), MilvusRetriever)


def test_newest_keys_are_exact_before_the_server_has_them() -> None:
    retriever = filled(2048)
    queries = real_qk()["L10h0"]["queries"]
    retriever.add(100 * queries[:, :3])
    assert int(retriever.indexed[0]) == 2048
    assert retriever.search(queries[:, :3], 1)[0, :, 0].tolist() == [2048, 2049, 2050]
    assert retriever.stats().fallbacks == 0


def test_a_collection_is_dropped_with_its_index() -> None:
    retriever = filled(1024)
    before = collections(retriever)
    assert before
    twin = retriever.fork()
    del twin
    gc.collect()
    assert collections(retriever) == before
    retriever.reset()
    gc.collect()
    assert len(collections(retriever)) == len(before) - 1


def test_a_server_that_fails_is_counted_and_answers_are_exact() -> None:
    retriever = filled(2048)
    queries = real_qk()["L10h0"]["queries"][:, :8]
    for name in collections(retriever):
        # As by somebody else.
        retriever._client().drop_collection(name)
    with pytest.warns(RuntimeWarning, match="search failed"):
        rows = retriever.search(queries, 16)
    assert retriever.stats().fallbacks == 1
    scores = queries[0].double() @ real_qk()["L10h0"]["keys"][0, :2048].double().T
    assert torch.equal(rows[0].sort().values, scores.topk(16).indices.sort().values)


def test_an_address_where_nobody_answers_is_named() -> None:
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingError, match=rf"retriever\.uri='{uri}': no Milvus server answers there"):
            filled(1024, uri=uri, timeout=1.0)
