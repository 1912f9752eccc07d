"""``lightning sweep``: cells are measured once, whatever happens in between."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_fot.bench import load_qk
from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from lightning_fot.report.content.sweep_tables import brief_tables, costs
from lightning_fot.request.request import SHIPPED, find_config, read_request
from lightning_fot.sweep.cost_model import cost_model, fit_power
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.grid import combinations
from lightning_fot.sweep.runs import run_cells
from lightning_fot.sweep.settings import SweepConfig
from lightning_fot.sweep.space import SearchConfig
from tests.support.patience import PATIENCE_S, wait_until

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and queries of two layers of two heads each."""
    generator = np.random.default_rng(0)
    arrays = {}
    for layer in (1, 3):
        for head in (0, 1):
            for kind, count in (("keys", 600), ("queries", 40), ("past_queries", 128)):
                arrays[f"L{layer}h{head}_{kind}"] = generator.standard_normal((count, 16), dtype=np.float32)
    file = tmp_path_factory.mktemp("keys") / "qk.npz"
    np.savez(file, **arrays)
    return file


def _config(folder: Path, keys: Path, retrievers: str, rest: str = "") -> Path:
    file = folder / "grid.yaml"
    file.write_text(
        f"sweep:\n  keys: {keys}\n  repeats: 1\n  batch: [1, 8]\n  top_k: [4]\n{rest}  retrievers:\n{retrievers}"
    )
    return file


HNSW = "    - {name: hnsw, M: [4, 8], query: {ef_search: [8, 32]}}\n"


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def _sweep(config: Path, folder: Path, *words: str) -> int:
    return main(["sweep", "--config", str(config), f"--run_dir={folder}", *words])


@pytest.mark.slow
def test_every_cell_is_measured_against_exact_search_and_only_once(tmp_path, keys, capsys):
    config, folder = _config(tmp_path, keys, HNSW), tmp_path / "out"
    assert _sweep(config, folder, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    rows = results["sweep"]["cells"]
    # 2 layers × (exact + 2 builds × 2 settings) × 2 batches
    assert len(rows) == 2 * (1 + 2 * 2) * 2
    assert results["complete"] is True
    page = (folder / "report.html").read_text()
    assert "600 keys a head, k=4; mean over the layers, 4 settings." in page
    assert "Not measured" not in page
    recorded = load_qk(keys)
    for row in rows:
        assert row["index_used"], row
        assert ("exact_ms_p50" in row) == (row["retriever"] != "exact")
        if row["retriever"] == "exact":
            assert row["recall"] == 1.0
    # Brute force in float64 says what HNSW with a wide search of 600 keys must find.
    wide = [row for row in rows if row["query"] == {"ef_search": 32} and row["build"] == "M=8" and row["batch"] == 8]
    assert [row["layer"] for row in wide] == [1, 3]
    assert all(0.5 < row["recall"] <= 1 for row in wide)
    for row in wide:
        bank = recorded[f"L{row['layer']}h0"]
        best = (bank["queries"][0].double() @ bank["keys"][0].double().T).topk(4).values
        weights = torch.softmax((bank["queries"][0].double() @ bank["keys"][0].double().T) / 4, dim=1)
        assert best.shape == (40, 4)
        assert row["mass"] < float(weights.topk(4).values.sum(1).mean()) + 0.05
    written = {path.name for path in folder.iterdir()}
    assert {"results.json", "cells.csv", "report.html", "recall_vs_speed.png", "config.yaml"} <= written
    with (folder / "cells.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    page = (folder / "report.html").read_text()
    assert "ef_search=32" in page
    assert "All cells" in page
    assert "http://" not in page.replace("http://www.w3.org", "")

    before = _times(folder)
    assert _sweep(config, folder) == 0
    assert _times(folder) == before
    assert "Pareto front" in capsys.readouterr().out


@pytest.mark.slow
def test_a_query_setting_more_keeps_what_was_measured(tmp_path, keys, capsys):
    folder = tmp_path / "out"
    assert _sweep(_config(tmp_path, keys, "    - {name: hnsw, query: {ef_search: [8]}}\n"), folder, "--json") == 0
    first = json.loads(capsys.readouterr().out)["sweep"]["cells"]
    more = "    - {name: hnsw, query: {ef_search: [8, 16]}}\n"
    assert _sweep(_config(tmp_path, keys, more), folder, "--json") == 0
    second = json.loads(capsys.readouterr().out)["sweep"]["cells"]
    kept = [row for row in second if row["query"] in ({}, {"ef_search": 8})]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, first))
    assert len(second) == len(first) + 2 * 2


@pytest.mark.slow
def test_killed_and_started_again_nothing_is_lost_or_done_twice(tmp_path, keys):
    config, folder = _config(tmp_path, keys, HNSW, "  memory_tokens: [200, 400, 600]\n"), tmp_path / "out"
    command = [sys.executable, "-m", "lightning_fot", "sweep", "--config", str(config), f"--run_dir={folder}"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: folder.exists() and len(_times(folder)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {
        path.name: path.read_bytes()
        for path in (folder / "cells").glob("*.json")
        if len(json.loads(path.read_text())["rows"]) == (4 if "hnsw" in path.read_text() else 2)
    }
    before = _times(folder)
    assert _sweep(config, folder) == 0
    assert len(_times(folder)) == 2 * 3 * 3
    for name, content in done.items():
        assert (folder / "cells" / name).read_bytes() == content
        assert _times(folder)[name] == before[name]
    assert json.loads((folder / "results.json").read_text())["complete"] is True


@pytest.mark.slow
def test_two_processes_share_one_folder(tmp_path, keys):
    config, folder = _config(tmp_path, keys, HNSW, "  memory_tokens: [200, 300, 400, 500, 600]\n"), tmp_path / "out"
    command = [sys.executable, "-m", "lightning_fot", "sweep", "--config", str(config), f"--run_dir={folder}"]
    both = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate(timeout=PATIENCE_S)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], words
    lines = [line for text in words for line in text.splitlines() if ": done in" in line]
    labels = [line.partition("] ")[2].partition(": done")[0] for line in lines]
    assert len(labels) == len(set(labels)) == 2 * 5 * 3
    assert json.loads((folder / "results.json").read_text())["complete"] is True


def test_a_claim_that_nobody_refreshes_is_taken_over(tmp_path):
    folder = SweepFolder(tmp_path)
    with folder.claim("a") as ours:
        assert ours
        with SweepFolder(tmp_path).claim("a") as theirs:
            assert not theirs
        path = tmp_path / "cells" / "a.claim"
        assert path.is_file()
    assert not path.exists()
    # Of a process that has gone, and of one on another machine that no longer refreshes it.
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    import socket

    path.write_text(json.dumps({"pid": int(gone.stdout), "host": socket.gethostname()}))
    with folder.claim("a") as ours:
        assert ours
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with folder.claim("a") as ours:
        assert not ours
    os.utime(path, (time.time() - 300, time.time() - 300))
    with folder.claim("a") as ours:
        assert ours


@pytest.mark.slow
def test_a_damaged_cell_is_measured_again(tmp_path, keys):
    config, folder = _config(tmp_path, keys, "    - exact\n"), tmp_path / "out"
    assert _sweep(config, folder) == 0
    path = next((folder / "cells").glob("*.json"))
    path.write_text("{ half")
    assert _sweep(config, folder) == 0
    assert json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_a_cell_under_the_name_of_another_is_measured_again(tmp_path, keys):
    config, folder = _config(tmp_path, keys, HNSW), tmp_path / "out"
    assert _sweep(config, folder) == 0
    files = sorted((folder / "cells").glob("*.json"))
    before = [json.loads(file.read_text())["settings"] for file in files]
    assert len({str(each) for each in before}) == len(files) > 1
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    assert _sweep(config, folder) == 0
    assert [json.loads(file.read_text())["settings"] for file in files] == before


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ({"retriever": []}, "sweep.retriever"),
        ({}, "sweep"),
        ({"retrievers": [{"M": 3}]}, "sweep.retrievers"),
        ({"retrievers": ["hnsw"], "top_k": 3}, "sweep.top_k"),
        ({"retrievers": ["hnsw"], "batch": [0]}, "sweep.batch"),
        ({"retrievers": ["hnsw"], "tokens": 10, "memory_tokens": [20]}, "sweep.memory_tokens"),
        ({"retrievers": ["hnsw"], "keys": "nowhere.npz"}, "sweep.keys"),
        ({"runs": {"trainer.max_steps": 3}}, "sweep.runs.trainer.max_steps"),
    ],
)
def test_wrong_settings_are_named(section, setting):
    with pytest.raises(SettingError) as error:
        SweepConfig.of(section).builds()
    assert error.value.setting == setting


def test_an_unknown_argument_is_refused_before_anything_is_measured(tmp_path, keys, capsys):
    folder = tmp_path / "out"
    assert _sweep(_config(tmp_path, keys, "    - {name: hnsw, query: {ef_serch: [8]}}\n"), folder) == 2
    assert "ef_serch" in capsys.readouterr().err
    assert not folder.exists()


def test_more_keys_than_recorded_is_named(tmp_path, keys, capsys):
    config = _config(tmp_path, keys, "    - exact\n", "  memory_tokens: [601]\n")
    assert _sweep(config, tmp_path / "out") == 2
    assert "601" in capsys.readouterr().err


def test_the_plan_does_nothing(tmp_path, keys, capsys):
    config, folder = _config(tmp_path, keys, HNSW), tmp_path / "out"
    assert _sweep(config, folder, "--plan") == 0
    said = capsys.readouterr().out
    assert "hnsw M=8: 4 settings" in said
    assert "6 of 6 cells to do: how long is known once" in said
    assert not folder.exists()
    assert _sweep(_config(tmp_path, keys, "    - exact\n"), folder) == 0
    capsys.readouterr()
    longer = _config(tmp_path, keys, "    - exact\n", "  memory_tokens: [600, 300]\n")
    assert _sweep(longer, folder, "--plan") == 0
    assert "2 of 4 cells to do: about" in capsys.readouterr().out


def test_power_laws_are_found_and_say_how_far_off_they_are():
    a, b, error = fit_power([1e3, 1e4, 1e5, 1e6], [0.3 * size**0.7 for size in (1e3, 1e4, 1e5, 1e6)])
    assert (a, b, error) == pytest.approx((0.3, 0.7, 1.0))
    rows = [
        {"retriever": "exact", "build": "", "query": {}, "layer": 1, "batch": 1, "k": 4, "banks": 2, "dim": 8,
         "memory_tokens": size, "search_ms_p50": 2e-6 * size * (1.5 if size == 100 else 1.0), "build_s": 0.0,
         "bytes": 32 * size}
        for size in (100, 1000, 10_000)
    ]  # fmt: skip
    (found,) = cost_model(rows, sizes=(100_000,))
    assert found["bytes"]["at"]["100000"] == pytest.approx(3.2e6)
    assert found["gigabytes"]["100000"] == pytest.approx((3.2e6 + 100_000 * 2 * 8 * 8) / 1e9)
    assert 1.0 < found["search_ms_p50"]["error"] < 1.5
    assert "build_s" not in found
    assert found["beyond"] == 10
    assert found["search_ms_p50"]["held_out"] is None
    assert cost_model(rows[:2]) == []


def _row(size, ms, **more):
    return {"retriever": "hnsw", "build": "M=8", "query": {"ef_search": 9}, "layer": 1, "batch": 1, "k": 4, "banks": 2,
            "dim": 8, "memory_tokens": size, "search_ms_p50": ms, "build_s": 1.0, "bytes": 32 * size,
            "recall": 1 - size / 1e6, **more}  # fmt: skip


def test_the_largest_size_is_held_out_to_tell_how_far_a_law_reaches():
    rows = [_row(size, 1e-3 * size**0.5) for size in (1000, 10_000, 100_000)] + [_row(1_000_000, 2.0)]
    (found,) = cost_model(rows)
    # The law of the other three says 1 ms, half of what was measured.
    assert found["search_ms_p50"]["held_out"] == pytest.approx(0.5)
    assert found["build_s"]["held_out"] == pytest.approx(1.0)
    assert found["recall"] == pytest.approx([0.999, 0.99, 0.9, 0.0])


def test_sizes_at_which_no_index_answered_are_no_part_of_its_law():
    rows = [_row(100, 50.0, index_used=False, build_s=0.0)]
    rows += [_row(size, 1e-3 * size**0.5, index_used=True) for size in (1000, 10_000, 100_000)]
    (found,) = cost_model(rows)
    assert found["measured"] == [1000, 10_000, 100_000]
    assert found["search_ms_p50"]["exponent"] == pytest.approx(0.5)
    assert cost_model(rows[:3]) == []
    # Exact search answers at every size, and is no index that was left out.
    exact = [_row(size, 1e-6 * size, retriever="exact", index_used=True) for size in (10, 100, 1000)]
    assert cost_model(exact)[0]["measured"] == [10, 100, 1000]


def test_the_cost_model_is_shown_with_its_machine_and_its_error():
    rows = [_row(size, 1e-3 * size**0.5) for size in (1000, 10_000, 100_000)] + [_row(1_000_000, 2.0)]
    results = {"environment": {"processor": "A chip", "threads": 2}, "sweep": {"cost_model": cost_model(rows)}}
    table = costs(results)
    assert "Measured on A chip, 2 threads." in table.note
    assert "100 times beyond" in table.note
    (row,) = table.rows
    shown = dict(zip(table.columns, (cell.text for cell in row), strict=True))
    assert shown["held out"] == "0.50×"
    assert shown["recall"] == "99.9% → 0%"
    laws = cost_model(rows)[0]
    assert dict(zip(table.columns, (cell.raw for cell in row), strict=True))["search, 1G"] == pytest.approx(
        laws["search_ms_p50"]["at"]["1000000000"]
    )
    (brief,) = brief_tables(results)
    assert brief.rows[0][-1].text == shown["RAM, 1G"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (SHIPPED / "sweeps").glob("*.yaml")))
def test_shipped_sweeps_parse_and_say_how_to_run_them(name):
    path, _ = find_config(f"configs/sweeps/{name}.yaml")
    assert path.read_text().splitlines()[0] == f"# lightning sweep --config configs/sweeps/{name}.yaml"
    request = read_request("sweep", ["--config", f"sweeps/{name}"])
    config = SweepConfig.of(request.get("sweep"))
    assert config.builds() or run_cells(config.runs, request.settings, Path("runs"))
    if config.search is not None:
        pytest.importorskip("optuna")
    assert main(["sweep", "--config", f"sweeps/{name}", "--plan", "--run_dir=nowhere"]) == 0


def test_grids_are_products():
    assert list(combinations({"a": [1, 2], "b": "x"})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]


@pytest.mark.slow
def test_records_with_a_model_and_measures(tmp_path, capsys):
    words = ["--sweep.memory_tokens=[256]", "--sweep.tokens=256", "--sweep.queries=32", "--sweep.past=64"]
    # The first key of each of the 4 windows is not kept: 252, not 256, which is known only after reading.
    words.append("--model.memory.skip_window_start=1")
    assert main(["sweep", "--config", "sweeps/smoke", f"--run_dir={tmp_path / 'out'}", "--json", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["sweep"]["cells"]
    assert {row["layer"] for row in rows} == {1, 3}
    assert {row["memory_tokens"] for row in rows} == {252}
    (recording,) = (tmp_path / "out" / "recordings").glob("*.safetensors")
    # One of other numbers under this name is another's, though nothing in it was altered.
    whole = recording.read_bytes()
    more = ["--sweep.tokens=320", *words[:1], *words[2:]]
    assert main(["sweep", "--config", "sweeps/smoke", f"--run_dir={tmp_path / 'out'}", *more]) == 0
    (other,) = set((tmp_path / "out" / "recordings").glob("*.safetensors")) - {recording}
    recording.write_bytes(other.read_bytes())
    assert main(["sweep", "--config", "sweeps/smoke", f"--run_dir={tmp_path / 'out'}", *words]) == 0
    assert "recording it again" in capsys.readouterr().err
    assert {len(each["keys"][0]) for each in load_qk(recording).values()} == {252}
    assert len(recording.read_bytes()) == len(whole)


@pytest.mark.slow
def test_runs_are_trained_once_and_a_failed_one_does_not_stop_the_others(tmp_path, capsys):
    config = tmp_path / "d.yaml"
    smoke = (SHIPPED / "smoke.yaml").read_text().replace("max_steps: 6", "max_steps: 1")
    smoke = smoke.replace("passkey_samples: 2", "passkey_samples: 0")
    config.write_text(smoke + "sweep:\n  runs:\n    model.crossbatch.range: [1, 2]\n    data.max_documents: [12]\n")
    folder = tmp_path / "out"
    assert _sweep(config, folder, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["sweep"]["runs"]
    assert [row["model.crossbatch.range"] for row in rows] == [1, 2]
    assert all(row["steps"] == 1 and row["perplexity, exact"] > 1 for row in rows)
    before = _times(folder)
    # A batch of 4 rows cannot show 9 contexts: said by the run, not before.
    config.write_text(
        smoke.replace("layout: packed", "layout: paper") + "sweep:\n  runs:\n    model.crossbatch.d: [9]\n"
    )
    assert _sweep(config, folder, "--json") == 1
    failed = json.loads(capsys.readouterr().out)
    assert "d" in next(iter(failed["sweep"]["failures"].values()))
    assert failed["complete"] is False
    assert {name: stamp for name, stamp in _times(folder).items() if name in before} == before


def test_the_page_on_sweeps_shows_what_there_is():
    from tests.support.markdown_blocks import ROOT, blocks

    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    grid, search = map(yaml.safe_load, blocks(page, "yaml"))
    assert SweepConfig.of(grid["sweep"]).builds()
    SearchConfig.of(search["sweep"]["search"]).check()
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[1:2] == ["sweep"] and (find_spec("optuna") or "search" not in line):
            assert main([*words[1:], "--plan"]) == 0
        else:
            assert words[:2] in ([], ["lightning", "report"], ["lightning", "sweep"])
