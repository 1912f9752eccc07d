"""The installed plug-in keeps the contract, found by its name."""

import pytest
from fot_usearch import UsearchRetriever

from lightning_fot.retrievers import available_retrievers, create_retriever
from lightning_fot.testing import RetrieverContract


class TestUsearch(RetrieverContract):
    retriever = UsearchRetriever


def test_found_by_name_once_installed() -> None:
    if "usearch" not in available_retrievers():
        pytest.fail("fot-usearch is not installed: pip install ./examples/fot-usearch")
    assert isinstance(create_retriever("usearch", dim=8), UsearchRetriever)
