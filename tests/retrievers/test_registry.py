"""Names, arguments and plug-ins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.cli import main
from lightning_fot.config.retriever import COMMON_ARGUMENTS
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers import (
    ExactRetriever,
    Retriever,
    available_retrievers,
    check_retriever,
    create_retriever,
    plugins,
    registry,
)
from tests.support.patience import PATIENCE_S

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
        ({"name": "faiss_ivf", "index_dtype": "int4"}, "index_dtype='int4'.*float32 or float16 or int8"),
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


@pytest.mark.slow
def test_plugin_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fot_mine_ok", PLUGIN)
    info = available_retrievers()["mine"]
    assert (info.source, info.version, info.importable, info.error) == ("fot_mine_ok", "1.5", True, None)
    assert "fot_mine_ok" not in sys.modules
    check_retriever({"name": "mine", "seed": 1})
    assert isinstance(create_retriever("mine", dim=4), Retriever)
    with pytest.raises(SettingError, match="wrong"):
        check_retriever({"name": "mine", "wrong": 1})


HEAD = "from lightning_fot.retrievers import ExactRetriever, PerBankRetriever\n"
# Source, and what the reason that is listed says.
BROKEN = {
    "misses": ("import no_such_library_at_all\n" + PLUGIN, "no_such_library_at_all"),
    "syntax": ("class Mine(\n", "SyntaxError"),
    "refuses": ("raise ImportError('built for another Python')\n", "built for another Python"),
    "raises": ("1 / 0\n", "ZeroDivisionError"),
    "exits": ("raise SystemExit('bye')\n", "SystemExit"),
    "kills": ("import os\nos._exit(3)\n", "code 3"),
    "lacks": ("Other = 3\n", "has no attribute 'Mine'"),
    "number": ("Mine = 3\n", "is not a class"),
    "foreign": ("class Mine:\n    pass\n", "is not a subclass of Retriever"),
    "factory": ("def Mine(dim, banks):\n    return 3\n", "makes a int"),
    "abstract": (HEAD + "class Mine(PerBankRetriever):\n    pass\n", "does not implement new_index"),
    "no_dim": (
        HEAD + "class Mine(ExactRetriever):\n    def __init__(self, **kw):\n        super().__init__(**kw, x=1)\n",
        "x",
    ),
    "closed": (
        HEAD
        + "class Mine(ExactRetriever):\n    def __init__(self, dim, banks=1):\n        super().__init__(dim, banks)\n",
        "takes no seed",
    ),
    "lazy": (
        HEAD + "class Mine(PerBankRetriever):\n    def new_index(self, dim):\n        import no_such_lazy\n",
        "no_such_lazy",
    ),
    "late": (
        HEAD
        + "class Mine(ExactRetriever):\n    def __init__(self, dim, banks=1, **kw):\n        import no_such_late\n",
        "no_such_late",
    ),
    "sleeps": ("import time\ntime.sleep(1000)\n" + PLUGIN, "takes more than 0.3 s"),
    # The line is named where the process gets time to look: on a busy machine it may not.
    "spins": ("while True:\n    pass\n", "takes more than 4 s"),
    "asks": ("input('Licence? ')\n" + PLUGIN, "Error"),
    "talks": ("print('lightning-fot:')\nraise ValueError('after all')\n", "after all"),
}


# Each costs a process that loads torch: one for each way to fail there. The others are tried in this one, below.
LISTED = ("exits", "kills", "foreign", "spins")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, registry.RetrieverInfo]:
    """What one call lists with broken plug-ins and a sound one installed."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_FOT_IMPORT_SECONDS", "4")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(plugins, "_START_SECONDS", PATIENCE_S)
        for name in LISTED:
            install(folder, patch, f"fot_mine_{name}", BROKEN[name][0], name)
        install(folder, patch, "fot_mine_sound", PLUGIN, "sound")
        return available_retrievers()


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_broken_plugin_is_listed_and_stops_nothing(name: str, listed: dict[str, registry.RetrieverInfo]) -> None:
    info = listed[name]
    assert not info.importable
    assert BROKEN[name][1] in str(info.error)
    assert f"fot_mine_{name}" in str(info.install)
    assert listed["sound"].importable
    assert listed["exact"].importable


def _limit(name: str) -> str:
    """Short for what sleeps longer anyway; none for what only has to wait for a busy machine."""
    return "0.3" if name == "sleeps" else str(PATIENCE_S)


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in ("kills", "spins")])
def test_what_is_wrong_with_a_plugin_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FOT_IMPORT_SECONDS", _limit(name))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"fot_tried_{name}.py").write_text(BROKEN[name][0].replace("1000", "2"))
    try:
        reason = plugins.what_is_wrong(plugins.load(f"fot_tried_{name}:Mine"), Retriever)
    except Exception as error:
        reason = plugins.describe(error)
    assert BROKEN[name][1] in str(reason)


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in ("kills", "spins", "closed", "lazy")])
def test_broken_plugin_is_named_when_chosen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FOT_IMPORT_SECONDS", _limit(name))
    install(tmp_path, monkeypatch, f"fot_chosen_{name}", BROKEN[name][0].replace("1000", "2"), name)
    with pytest.raises((SettingError, MissingLibraryError), match=name):
        create_retriever(name, dim=4)


def test_hanging_class_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FOT_IMPORT_SECONDS", "0.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fot_hanging_path.py").write_text("import time\ntime.sleep(1)\n")
    with pytest.raises(SettingError, match=r"takes more than 0\.2 s.*LIGHTNING_FOT_IMPORT_SECONDS"):
        create_retriever("fot_hanging_path.Mine", dim=4)


@pytest.mark.slow
def test_an_entry_point_that_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fot_mine_odd", PLUGIN)
    (tmp_path / "fot_mine_odd-1.5.dist-info" / "entry_points.txt").write_text("[lightning_fot.retrievers]\nodd = ??\n")
    assert not available_retrievers()["odd"].importable


@pytest.mark.slow
def test_the_command_prints_whatever_a_broken_plugin_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "fot_mine_marks", "raise ValueError('[/red] [3]')\n", "marks")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["retrievers"]) == 0
    assert re.search(r"^marks +fot_mine_marks +1\.5 +ValueError: \[/red\] \[3\]", capsys.readouterr().out, re.MULTILINE)


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
