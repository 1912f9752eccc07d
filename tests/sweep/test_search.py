"""A search with Optuna: what may be tried, and that no trial is lost or done twice whatever happens in between."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_fot.cli import main
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.request.request import SHIPPED, read_request
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.grid import Build
from lightning_fot.sweep.search import Search, index_measures
from lightning_fot.sweep.settings import SweepConfig
from lightning_fot.sweep.space import Domain, SearchConfig, check_optuna
from tests.support.patience import PATIENCE_S, wait_until

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="the extra optuna is not installed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
HNSW: dict[str, Any] = {
    "name": "hnsw",
    "M": {"low": 4, "high": 16, "log": True},
    "query": {"ef_search": {"low": 4, "high": 32}},
}
IVF = {"name": "faiss_ivf", "nlist": [4, 8], "query": {"nprobe": {"low": 1, "high": 4}}}


class First:
    """Draws the lowest number, or the last of several."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.names.append(name)
        return low

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.names.append(name)
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.names.append(name)
        return choices[-1]


def test_what_is_drawn_is_an_index_with_its_query():
    trial = First()
    drawn = SearchConfig(retrievers=[HNSW, IVF]).draw(trial)
    assert drawn == Build({"name": "faiss_ivf", "nlist": 8, "min_index_size": 1}, ({"nprobe": 1},))
    assert trial.names == ["retriever", "faiss_ivf.nlist", "faiss_ivf.nprobe"]


def test_what_is_drawn_may_be_settings_of_a_run():
    space = {"model.memory.memory_layers": [[1], [1, 3]], "model.optimizer.lr": {"low": 1e-4, "high": 1}, "seed": 3}
    config = SearchConfig(runs=space, minimize=["loss_last"])
    assert config.draw(First()) == {"model.memory.memory_layers": [1, 3], "model.optimizer.lr": 1e-4, "seed": 3}
    assert config.corners() == [
        {"model.memory.memory_layers": [1], "model.optimizer.lr": 1e-4, "seed": 3},
        {"model.memory.memory_layers": [1, 3], "model.optimizer.lr": 1, "seed": 3},
    ]


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"low": 3},
        {"low": 3, "high": 3},
        {"low": 0, "high": 3, "log": True},
        {"low": 1, "hi": 3},
        {"low": "a", "high": 2},
    ],
)
def test_no_range(value):
    with pytest.raises(SettingError, match=r"sweep\.x"):
        Domain("sweep.x", value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "asks for nothing"),
        ({"retrievers": [HNSW], "runs": {"a": [1]}}, "or both"),
        ({"retrievers": ["exact"]}, "is no index"),
        ({"retrievers": [HNSW, HNSW]}, "names one twice"),
        ({"retrievers": [HNSW], "trails": 3}, "Did you mean trials"),
        ({"retrievers": [HNSW], "trials": 0}, "search.trials=0"),
        ({"retrievers": [HNSW], "maximize": ["recal"]}, "Did you mean recall"),
        ({"runs": {"a": [1]}}, "sweep.search.minimize"),
        ({"retrievers": [{"name": "hnsw", "N": [4]}]}, "N"),
        ({"retrievers": [{"name": "hnsw", "M": {"low": -4, "high": 4}}]}, "M"),
    ],
)
def test_wrong_searches_are_named(section, message):
    with pytest.raises(SettingError, match=message):
        SearchConfig.of(section).check()


def test_a_search_compares_alike():
    config = SweepConfig.of({"search": {"retrievers": [HNSW]}, "top_k": [4], "batch": [1, 8]})
    with pytest.raises(SettingError, match=r"sweep.batch=\[1, 8\]"):
        config.search_config()


def test_the_shipped_search_is_understood():
    section = read_request("sweep", ["--config", "sweeps/search"]).get("sweep")
    config = SweepConfig.of(section)
    SearchConfig.of(config.search).check()
    assert [build.label for build in config.builds()] == ["exact"]
    assert (
        (SHIPPED / "sweeps" / "search.yaml").read_text().startswith("# lightning sweep --config configs/sweeps/search")
    )


def test_layers_are_averaged_and_the_worst_head_counts():
    rows = [
        {"recall": 1.0, "recall_worst_head": 0.9, "search_ms_p50": 1.0, "exact_ms_p50": 1.0, "bytes": 10},
        {"recall": 0.5, "recall_worst_head": 0.4, "search_ms_p50": 1.0, "exact_ms_p50": 9.0, "bytes": 30},
    ]
    found = index_measures(rows)
    assert found["speed"] == pytest.approx(3.0)
    assert (found["recall"], found["recall_worst_head"], found["bytes"]) == (0.75, 0.4, 20)


@pytest.mark.skipif(find_spec("optuna") is not None, reason="optuna is installed")
def test_without_optuna_its_installation_is_told():
    with pytest.raises(MissingLibraryError, match=r"pip install 'lightning-fot\[optuna\]'"):
        check_optuna()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    shapes = {"keys": (400, 16), "queries": (40, 16), "past_queries": (64, 16)}
    arrays = {f"L1h0_{kind}": generator.standard_normal(shape, dtype=np.float32) for kind, shape in shapes.items()}
    file = tmp_path_factory.mktemp("keys") / "qk.npz"
    np.savez(file, **arrays)
    return file


def _config(folder: Path, keys: Path, trials: int, **more: Any) -> Path:
    search = {"trials": trials, "retrievers": [HNSW, IVF], **more}
    section = {"keys": str(keys), "repeats": 1, "batch": [8], "top_k": [4], "search": search}
    file = folder / "search.yaml"
    file.write_text(json.dumps({"sweep": section}))
    return file


def _sweep(config: Path, folder: Path, *words: str) -> int:
    return main(["sweep", "--config", str(config), f"--run_dir={folder}", *words])


def _command(config: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "lightning_fot", "sweep", "--config", str(config), f"--run_dir={folder}"]


def _cells(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.json")}


def _found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["sweep"]["search"]


@pytest.mark.slow
@needs_optuna
def test_trials_are_cells_and_a_longer_search_goes_on(tmp_path, keys, capsys):
    folder = tmp_path / "out"
    assert _sweep(_config(tmp_path, keys, 4, at_least={"recall": 0.3}), folder, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    first, rows = results["sweep"]["search"], results["sweep"]["cells"]
    assert results["complete"] is True
    assert [trial["trial"] for trial in first["trials"]] == [0, 1, 2, 3]
    assert rows[0]["retriever"] == "exact"
    # What a trial says is what its row says, and the best are those that no other beats.
    for trial in first["trials"]:
        name = trial["retriever"]
        drawn = {key.removeprefix(f"{name}."): value for key, value in trial.items() if key.startswith(f"{name}.")}
        (row,) = [row for row in rows if row["retriever"] == name and drawn.items() <= row["args"].items()]
        assert trial["recall"] == pytest.approx(row["recall"])
        assert trial["speed"] == pytest.approx(row["exact_ms_p50"] / row["search_ms_p50"])
    good = {trial["trial"]: (trial["recall"], trial["speed"]) for trial in first["trials"] if trial["recall"] >= 0.3}
    front = [
        number
        for number, place in good.items()
        if not any(other != place and min(np.subtract(other, place)) >= 0 for other in good.values())
    ]
    assert set(first["best"]) <= set(front)
    assert {good[number] for number in first["best"]} == {good[number] for number in front}

    before = _cells(folder)
    assert _sweep(_config(tmp_path, keys, 4, at_least={"recall": 0.3}), folder) == 0
    assert "Search: the best of 4 trials" in capsys.readouterr().out
    assert _cells(folder) == before
    assert _sweep(_config(tmp_path, keys, 6, at_least={"recall": 0.3}), folder) == 0
    assert _found(folder)["trials"][:4] == first["trials"]
    assert len(_found(folder)["trials"]) == 6
    assert "Search: the best of 6 trials" in (folder / "report.html").read_text()
    with (folder / "trials.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert _sweep(_config(tmp_path, keys, 8, at_least={"recall": 0.3}), folder, "--plan") == 0
    assert "search: 6 of 8 trials done" in capsys.readouterr().out


@needs_optuna
@pytest.mark.slow
def test_killed_and_started_again_the_trial_under_way_is_done_too(tmp_path, keys):
    config, folder = _config(tmp_path, keys, 12), tmp_path / "out"
    process = subprocess.Popen(
        _command(config, folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(list((folder / "cells").glob("*.json"))) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _cells(folder)
    assert _sweep(config, folder) == 0
    found = _found(folder)
    assert found["complete"] is True
    assert len(found["trials"]) == 12
    # What was measured before the kill was not measured again.
    after = _cells(folder)
    for name, content in before.items():
        rows = [json.dumps(row) for row in json.loads(content)["rows"]]
        assert rows == [json.dumps(row) for row in json.loads(after[name])["rows"]][: len(rows)]


@needs_optuna
@pytest.mark.slow
def test_two_processes_share_the_trials_of_one_folder(tmp_path, keys):
    config, folder = _config(tmp_path, keys, 16), tmp_path / "out"
    both = [
        subprocess.Popen(_command(config, folder), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    words = [process.communicate(timeout=PATIENCE_S)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], words
    told = [line.split(" (")[0] for text in words for line in text.splitlines() if line.startswith("Trial ")]
    assert sorted(told) == sorted(f"Trial {number}" for number in range(16))
    assert len(_found(folder)["trials"]) == 16


@pytest.mark.slow
@needs_optuna
def test_two_folders_share_a_storage(tmp_path, keys):
    config = _config(tmp_path, keys, 5, storage=f"sqlite:///{tmp_path / 'all.db'}")
    assert _sweep(config, tmp_path / "a") == 0
    assert _sweep(config, tmp_path / "b") == 0
    # All of them had been done: the second folder measured exact search alone.
    assert _found(tmp_path / "b")["trials"] == _found(tmp_path / "a")["trials"]
    assert len(_cells(tmp_path / "b")) == 1
    assert not (tmp_path / "a" / "search.journal").exists()


@needs_optuna
def test_a_trial_of_a_process_that_has_gone_is_tried_again_and_one_that_failed_is_not(tmp_path):
    config = SearchConfig(runs={"x": {"low": 0.0, "high": 1.0}}, minimize=["loss"], trials=3)
    folder = SweepFolder(tmp_path)
    search = Search(config, folder, "identity")
    with search.next() as lost:
        assert lost is not None
        # Another process sees that somebody is at it.
        with Search(config, folder, "identity").next() as other:
            assert other is not None
            assert other[0].number == 1
            search.fail(other[0], "no memory left")
    # As after a kill: the claim is free, and the trial has no answer.
    with search.next() as again:
        assert again is not None
        assert again[1] == lost[1]
        with pytest.raises(SettingError, match="was not measured"):
            search.tell(again[0], {"other": 1.0})
        search.tell(again[0], {"loss": 0.5})
    with search.next() as last:
        assert last is not None
        search.tell(last[0], {"loss": 0.25})
    with search.next() as none:
        assert none is None
    found = search.results()
    assert found["best"] == [last[0].number]
    assert [trial["error"] for trial in found["trials"]] == ["no memory left", None, None]
    # Another model, or another space, is another study.
    assert Search(config, folder, "other").ended == 0


@pytest.mark.slow
@needs_optuna
def test_a_storage_that_cannot_be_opened_is_named(tmp_path, keys, capsys):
    config = _config(tmp_path, keys, 2, storage="sqlite:////nowhere/at/all.db")
    assert _sweep(config, tmp_path / "out") == 2
    assert "sweep.search.storage" in capsys.readouterr().err


@needs_optuna
@pytest.mark.slow
def test_runs_are_searched(tmp_path, capsys):
    smoke = (SHIPPED / "smoke.yaml").read_text().replace("max_steps: 6", "max_steps: 1")
    config = tmp_path / "runs.yaml"
    config.write_text(
        smoke.replace("passkey_samples: 2", "passkey_samples: 0")
        + "sweep:\n  search:\n    trials: 2\n    minimize: [loss_last]\n    runs:\n"
        + "      model.crossbatch.range: [1, 2]\n"
        + "      model.optimizer.init_args.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n"
    )
    assert _sweep(config, tmp_path / "out", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    runs, trials = results["sweep"]["runs"], results["sweep"]["search"]["trials"]
    assert [row["loss_last"] for row in runs] == [trial["loss_last"] for trial in trials]
    assert len({row["model.optimizer.init_args.lr"] for row in runs}) == 2
