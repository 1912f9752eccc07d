"""Names, arguments and plug-ins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers import (
    ExactRetriever,
    Retriever,
    available_retrievers,
    check_retriever,
    create_retriever,
    registry,
)
from lightning_fot.retrievers.settings import COMMON_ARGUMENTS

PLUGIN = "from lightning_fot.retrievers import ExactRetriever\n\n\nclass Mine(ExactRetriever):\n    pass\n"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, name: str = "mine") -> None:
    """Lay out an installed distribution with one entry point."""
    info = folder / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[lightning_fot.retrievers]\n{name} = {module}:Mine\n")
    (folder / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("name", registry._BUILTIN)
def test_argument_table_matches_the_classes(name: str) -> None:
    known = registry.constructor_arguments(registry._resolve(name))
    assert known is not None
    assert set(known) == {*registry._BUILTIN[name].arguments, *COMMON_ARGUMENTS}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hnws", "Did you mean hnsw"),
        ({"name": "hnsw", "ef_serch": 3}, "Did you mean ef_search.*ef_construction"),
        ({"name": "hnsw", "M": 1}, "M=1"),
        ({"name": "faiss_ivf", "nprobe": 0}, "nprobe=0"),
        ({"name": "exact", "transform": {"centre": True}}, "centre"),
        ({"name": "exact", "min_index_size": -1}, "min_index_size"),
        ({"M": 3}, "no name"),
        (3, "exact, faiss_ivf"),
        ("no.such.Class", "no.such.Class"),
    ],
)
def test_bad_settings_are_named(spec: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_retriever(spec)
    with pytest.raises(SettingError, match=message):
        create_retriever(spec, dim=8)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    real = registry.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "hnswlib" else real(name))
    with pytest.raises(MissingLibraryError, match="pip install hnswlib"):
        check_retriever("hnsw")
    with pytest.raises(MissingLibraryError, match="pip install hnswlib"):
        create_retriever("hnsw", dim=8)
    info = available_retrievers()["hnsw"]
    assert not info.importable
    assert info.install == "pip install hnswlib"


def test_ways_to_name_a_retriever() -> None:
    for spec in (
        "exact",
        {"name": "exact", "seed": 3},
        ExactRetriever,
        lambda dim, banks: ExactRetriever(dim, banks),
        "lightning_fot.retrievers.exact.ExactRetriever",
    ):
        check_retriever(spec)
        assert isinstance(create_retriever(spec, dim=4, banks=2), ExactRetriever)
    with pytest.raises(SettingError, match="must make a Retriever"):
        create_retriever(lambda dim, banks: 3, dim=4)


def test_plugin_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fot_mine_ok", PLUGIN)
    for load in (False, True):
        info = available_retrievers(load=load)["mine"]
        assert (info.source, info.version, info.importable) == ("fot_mine_ok", "1.5", True)
    check_retriever({"name": "mine", "seed": 1})
    assert isinstance(create_retriever("mine", dim=4), Retriever)
    with pytest.raises(SettingError, match="wrong"):
        check_retriever({"name": "mine", "wrong": 1})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library_at_all\n" + PLUGIN, "no_such_library_at_all"),
        ("class Mine(\n", "SyntaxError"),
        ("raise ImportError('built for another Python')\n", "raises at import"),
        ("Other = 3\n", "defines no 'Mine'"),
    ],
)
def test_broken_plugin_is_listed_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    install(tmp_path, monkeypatch, "fot_mine_broken", source)
    info = available_retrievers()["mine"]
    assert not info.importable
    assert reason in str(info.error)
    assert not available_retrievers(load=True)["mine"].importable
    assert available_retrievers()["exact"].importable
    with pytest.raises((SettingError, MissingLibraryError), match="mine"):
        create_retriever("mine", dim=4)
    sys.modules.pop("fot_mine_broken", None)


def test_a_plugin_cannot_hide_a_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fot_mine_exact", PLUGIN, name="exact")
    with pytest.warns(UserWarning, match="hidden by the built-in"):
        assert available_retrievers()["exact"].source == "built-in"


def test_listing_and_checking_load_no_torch() -> None:
    code = (
        "import sys; from lightning_fot.retrievers import available_retrievers, check_retriever;"
        "available_retrievers(); check_retriever({'name': 'hnsw', 'M': 8});"
        "assert not {'torch', 'numpy', 'hnswlib', 'faiss', 'scann'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
