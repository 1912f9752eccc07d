"""Cells as tasks of a Ray cluster: the same cells in the same files, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from lightning_fot.request.request import SHIPPED
from lightning_fot.sweep.doing.cell import Here, Place
from lightning_fot.sweep.doing.flow import Flow, Unit
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.runs import RunCell
from lightning_fot.sweep.settings import SweepConfig, TaskSettings
from lightning_fot.system.progress import JobProgress
from lightning_fot.system.signals import Stopped
from tests.support.cells import OneCell
from tests.support.patience import PATIENCE_S, wait_until

HNSW = {"name": "hnsw", "M": [4, 8], "query": {"ef_search": [8, 32]}}
RANGE = {"name": "hnsw", "M": {"low": 4, "high": 16}, "query": {"ef_search": {"low": 4, "high": 32}}}
# Cores are shared, so that as many fit as are wanted.
WORKERS = "--sweep.workers={count: 2, cpus: 0}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and queries of two layers."""
    generator = np.random.default_rng(0)
    shapes = {"keys": (400, 16), "queries": (40, 16), "past_queries": (64, 16)}
    arrays = {
        f"L{layer}h0_{kind}": generator.standard_normal(shape, dtype=np.float32)
        for layer in (1, 3)
        for kind, shape in shapes.items()
    }
    file = tmp_path_factory.mktemp("keys") / "qk.npz"
    np.savez(file, **arrays)
    return file


def written(folder: Path, keys: Path, **section: Any) -> Path:
    file = folder / "grid.yaml"
    file.write_text(json.dumps({"sweep": {"keys": str(keys), "repeats": 1, "batch": [8], "top_k": [4], **section}}))
    return file


def cells(folder: Path) -> dict[str, Any]:
    """Of each file what depends neither on time nor on how many threads have built a graph."""
    found, kept = {}, ("layer", "build", "query", "k", "batch", "memory_tokens", "index_used")
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        rows = [{name: row[name] for name in kept} for row in cell["rows"]]
        found[path.name] = (cell["settings"], rows)
    return found


def sweep(config: Path, folder: Path, *words: str) -> int:
    return main(["sweep", "--config", str(config), f"--run_dir={folder}", *words])


@pytest.mark.slow
def test_tasks_make_the_same_cells_in_the_same_files(cluster: Any, tmp_path: Path, keys: Path) -> None:
    config = written(tmp_path, keys, retrievers=["exact", HNSW])
    assert sweep(config, tmp_path / "here") == 0
    assert sweep(config, tmp_path / "there", WORKERS) == 0
    assert cells(tmp_path / "there") == cells(tmp_path / "here")
    assert len(cells(tmp_path / "there")) == 2 * 3
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there")]
    assert all(one["complete"] for one in results)
    assert not list((tmp_path / "there" / "cells").glob("*.claim"))
    # What one way has done the other does not do again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "here" / "cells").glob("*.json")}
    assert sweep(config, tmp_path / "here", WORKERS) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="the extra optuna is not installed")
def test_trials_are_tasks_too(cluster: Any, tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, keys, search={"trials": 4, "retrievers": [RANGE]})
    found = {}
    for name, words in (("here", ()), ("there", (WORKERS,))):
        assert sweep(config, tmp_path / name, *words) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Trial ")]
        assert sorted(line[:7] for line in told) == [f"Trial {number}" for number in range(4)]
        found[name] = json.loads((tmp_path / name / "results.json").read_text())["sweep"]["search"]
    # The first trials are drawn by their numbers alone, whatever others have found.
    drawn = [
        [{key: value for key, value in trial.items() if key not in one["objectives"]} for trial in one["trials"]]
        for one in found.values()
    ]
    assert drawn[0] == drawn[1]
    assert found["there"]["complete"]
    assert cells(tmp_path / "there").keys() == cells(tmp_path / "here").keys()


def flow(folder: SweepFolder, place: Place, check: Any = lambda: None) -> tuple[Flow, dict[str, str], list[str]]:
    failures: dict[str, str] = {}
    busy: list[str] = []
    return Flow(folder, place, JobProgress(), check, failures, busy, False), failures, busy


def units(*units: Unit) -> Any:
    return partial(next, iter(units), None)


def tasks(folder: SweepFolder, count: int = 2) -> Any:
    from lightning_fot.sweep.doing.tasks import Tasks

    return Tasks(TaskSettings(count, cpus=0), folder)


def done(folder: SweepFolder, names: Sequence[str]) -> list[bool]:
    return [bool((folder.read(name) or {}).get("rows")) for name in names]


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_cell_that_fails_is_told_and_the_others_go_on(where: str, tmp_path: Path, request: Any) -> None:
    folder = SweepFolder(tmp_path / "out")
    if where == "there":
        request.getfixturevalue("cluster")
    doing, failures, busy = flow(folder, Here(folder, lambda: None) if where == "here" else tasks(folder))
    ended: list[Any] = []
    grid = Unit([OneCell("a", "well", tmp_path), OneCell("b", "wrong", tmp_path)], ended.append)
    trial = Unit([OneCell("c", "well", tmp_path)], ended.append, waits=True)
    doing.do(units(grid, trial))
    said = "SettingError: cell='b': cannot work. Take another."
    assert failures == {"cell b": said}
    assert (folder.read("b") or {})["error"] == said
    assert set(ended) == {None, said}
    assert done(folder, "abc") == [True, False, True]
    assert busy == []
    assert not list(folder.cells.glob("*.claim"))


def test_a_task_whose_process_dies_is_begun_again(cluster: Any, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    doing, failures, _ = flow(folder, tasks(folder))
    doing.do(units(*(Unit([OneCell(name, how, tmp_path)]) for name, how in (("a", "dies"), ("b", "well")))))
    assert failures == {}
    assert done(folder, "ab") == [True, True]
    assert len((tmp_path / "a.begun").read_text().split()) == 2


def test_tasks_that_are_stopped_save_what_they_have(cluster: Any, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")

    def check() -> None:
        if (tmp_path / "a.begun").exists():
            raise Stopped(signal.SIGTERM)

    doing, _, _ = flow(folder, tasks(folder), check)
    with pytest.raises(Stopped):
        doing.do(units(Unit([OneCell("a", "long", tmp_path)])))
    # It has ended when the sweep does.
    assert (tmp_path / "a.saved").exists()
    assert done(folder, "a") == [False]
    assert not list(folder.cells.glob("*.claim"))


def test_what_another_process_is_doing_is_left_to_it(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    with folder.claim("a"):
        doing, _, busy = flow(folder, Here(folder, lambda: None))
        doing.do(units(Unit([OneCell("a", "well", tmp_path)]), Unit([OneCell("b", "well", tmp_path)])))
    assert busy == ["cell a"]
    assert done(folder, "ab") == [False, True]


def test_a_trial_waits_for_a_cell_that_another_process_is_doing(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    held, looked, ended = folder.claim("a"), [0], list[Any]()
    held.__enter__()

    def check() -> None:
        looked[0] += 1
        if looked[0] == 2:
            # The other process ends.
            folder.write("a", {"rows": [{"key": "theirs"}]})
            held.__exit__(None, None, None)

    doing, _, busy = flow(folder, Here(folder, check), check)
    doing.do(units(Unit([OneCell("a", "wrong", tmp_path)], ended.append, waits=True)))
    assert ended == [None]
    assert busy == []
    assert not (tmp_path / "a.begun").exists()


@pytest.mark.slow
def test_runs_are_tasks_and_one_that_fails_does_not_stop_the_other(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = (SHIPPED / "smoke.yaml").read_text().replace("max_steps: 6", "max_steps: 1")
    smoke = smoke.replace("passkey_samples: 2", "passkey_samples: 0").replace("layout: packed", "layout: paper")
    config = tmp_path / "d.yaml"
    # A batch of 4 rows cannot show 9 contexts: said by the run, not before.
    config.write_text(smoke + "sweep:\n  runs:\n    model.crossbatch.d: [2, 9]\n    data.max_documents: [12]\n")
    assert sweep(config, tmp_path / "out", WORKERS, "--json") == 1
    results = json.loads(capsys.readouterr().out)["sweep"]
    assert [row["model.crossbatch.d"] for row in results["runs"]] == [2]
    assert results["runs"][0]["perplexity, exact"] > 1
    ((label, said),) = results["failures"].items()
    assert label == "run d=9, max_documents=12"
    assert said.startswith("RuntimeError: ")
    assert len(list((tmp_path / "out" / "runs").glob("*.log"))) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux alone")
def test_a_run_does_not_outlive_its_sweep(tmp_path: Path) -> None:
    child = (
        "import os, sys, time\nfrom lightning_fot.sweep.doing.child import end_with_parent\n"
        "end_with_parent(int(sys.argv[1]))\nopen(sys.argv[2], 'w').write(str(os.getpid()))\ntime.sleep(3600)"
    )
    file = tmp_path / "pid"
    words = f"[sys.executable, '-c', {child!r}, str(os.getpid()), {str(file)!r}]"
    parent = f"import os, subprocess, sys\nsubprocess.run({words})"
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_until(lambda: file.exists() and file.read_text() != "", process)
    process.kill()
    process.wait()
    ends = time.monotonic() + PATIENCE_S
    while not ended(file.read_text()):
        assert time.monotonic() < ends, "it goes on"
        time.sleep(0.01)


def ended(pid: str) -> bool:
    """Whether a process is no more, though nobody may have asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "there"])
def test_a_run_saves_what_it_has_when_its_sweep_is_told_to_stop(where: str, tmp_path: Path) -> None:
    if where == "there":
        pytest.importorskip("ray")
    config = tmp_path / "runs.yaml"
    smoke = (SHIPPED / "smoke.yaml").read_text().replace("max_steps: 6", "max_steps: 100000")
    config.write_text(smoke + "sweep:\n  runs:\n    data.max_documents: [12]\n")
    folder = tmp_path / "out"
    words = [sys.executable, "-m", "lightning_fot", "sweep", "--config", str(config), f"--run_dir={folder}"]
    words += [WORKERS] if where == "there" else []
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def trains() -> bool:
        logs = list((folder / "runs").glob("*.log")) if folder.exists() else []
        return any("] train: step" in log.read_text() for log in logs)

    wait_until(trains, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "Go on with:" in said
    (file,) = (folder / "runs").glob("*.yaml")
    cell = RunCell({}, {}, folder / "runs")
    assert file.exists()
    assert type(cell.folder)(folder / "runs" / file.stem).resumable


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, r"sweep\.workers\.count=0: must be a whole number"),
        ("two", r"sweep\.workers\.count='two'"),
        ({"address": "auto"}, r"sweep\.workers=.*does not say how many"),
        ({"count": 2, "gpu": 1}, r"sweep\.workers\.gpu=1: is not known. Did you mean gpus\?"),
        ({"count": 2, "gpus": -1}, r"sweep\.workers\.gpus=-1"),
        ({"count": 2, "memory_mib": 0}, r"sweep\.workers\.memory_mib=0"),
    ],
)
def test_settings_that_cannot_work(given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SweepConfig.of({"retrievers": ["exact"], "workers": given}).tasks()


def test_nothing_is_begun_without_ray(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_fot.shards.engine.find_spec", lambda name: None)
    config = written(tmp_path, keys, retrievers=["exact"])
    assert sweep(config, tmp_path / "out", "--sweep.workers=2") == 2
    said = capsys.readouterr().err
    assert "sweep.workers needs the library 'ray'" in said
    assert "pip install 'lightning-fot[ray]'" in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_begun_where_nobody_answers(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    config = written(tmp_path, keys, retrievers=["exact"])
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert sweep(config, tmp_path / "out", f"--sweep.workers={{count: 2, address: '{address}'}}") == 2
    assert f"sweep.workers.address='{address}': cannot be joined" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_that_do_not_fit_are_refused(
    cluster: Any, tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, keys, retrievers=["exact"])
    for words, said in (
        ("{count: 1, gpus: 1}", "sweep.workers.gpus=1: is more than any machine of the cluster has (0)"),
        ("{count: 3, cpus: 1}", "sweep.workers.count=3: processes of cpus=1 do not fit"),
    ):
        assert sweep(config, tmp_path / "out", f"--sweep.workers={words}") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_machines_do_not_see_is_refused(cluster: Any, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    place = tasks(folder)
    folder.path.mkdir()
    folder.config.write_text("mine")
    place.greet(folder.config)

    class Other(type(tmp_path)):  # type: ignore[misc]
        """A file that is another here than there."""

        def read_text(self, *args: Any, **kwargs: Any) -> str:
            return "another"

    with pytest.raises(SettingError, match=r"run_dir=.*: is not the same folder on .*disk that all machines"):
        place.greet(Other(folder.config))
