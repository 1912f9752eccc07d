"""The retrievers' benchmark runs whole on few keys, and prints ratios that are numbers and recall that can be."""

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.benchmark_scripts import refused
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "retrievers.py"
INDEXES = {"faiss_ivf", "hnsw", "scann"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    file.write_text(json.dumps({"schema": 1, "sections": {"earlier": {"rows": [{"kept": 1}]}}}), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--quick", "--retrievers", ",".join(sorted(INDEXES)), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(file.read_text(encoding="utf-8"))["sections"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("a", ["ratio", "us", "raw_us"]),
        ("b", ["ratio", "limit", "us", "torch_us"]),
        ("c", ["ratio", "single_ratio", "us", "bytes"]),
        ("d", ["over_steady", "add_ms", "next_ms", "flush_s"]),
        ("e", ["ratio", "single_ratio", "us", "bytes"]),
    ],
)
def test_every_section_prints_finite_numbers(quick, section, fields):
    printed, kept = quick
    assert f"\n{section}. " in printed
    rows = kept[section]["rows"]
    assert rows
    for row in rows:
        assert row["fallbacks" if "fallbacks" in row else "ratio"] >= 0
        for field in fields:
            assert math.isfinite(row[field])
            assert row[field] > 0


@pytest.mark.slow
def test_head_says_where_it_was_measured(quick):
    printed, kept = quick
    for word in ("cores", "threads", "torch", "hnswlib", "faiss-cpu", "scann", "load"):
        assert word in printed
    assert kept["c"]["settings"]["k"] == 32
    assert kept["earlier"]["rows"] == [{"kept": 1}]


@pytest.mark.slow
def test_both_sides_of_a_ratio_are_given(quick):
    _, kept = quick
    rows = kept["a"]["rows"]
    assert {(row["retriever"], row["batch"]) for row in rows} == {(name, size) for name in INDEXES for size in (1, 64)}
    for row in rows:
        assert 0.3 < row["raw_recall"] <= 1
        # Keys set apart are found by the retriever only.
        assert row["recall"] >= row["raw_recall"] - 0.05
        assert row["fallbacks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("section", ["c", "e"])
def test_speed_comes_with_recall(quick, section):
    _, kept = quick
    rows = kept[section]["rows"]
    assert {row["retriever"] for row in rows} == {"exact", *INDEXES}
    for row in rows:
        if row["retriever"] == "exact":
            assert row["recall"] == row["mass_recall"] == pytest.approx(1.0, abs=1e-6)
        else:
            assert 0.2 < row["recall"] <= 1
            assert row["recall"] - 0.05 <= row["mass_recall"] <= 1 + 1e-6
        assert 0 < row["mass"] <= 1
        assert row["fallbacks"] == 0


@pytest.mark.slow
def test_exact_search_is_exact_at_either_batch(quick):
    _, kept = quick
    assert [row["recall"] for row in kept["b"]["rows"]] == [1.0, 1.0]


@pytest.mark.slow
def test_stretched_keys_are_said_to_be(quick):
    printed, kept = quick
    assert {(row["tokens"], row["recorded"]) for row in kept["c"]["rows"]} == {(4096, 4096)}
    assert {(row["tokens"], row["recorded"]) for row in kept["e"]["rows"]} == {(8192, 6144)}
    assert "6,144 recorded keys and 2,048 stretched" in printed


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module("support.heads")


def test_recall_and_mass_of_rows_against_a_plain_count(heads, tmp_path):
    random = np.random.default_rng(0)
    keys, queries = random.normal(size=(300, 8)), random.normal(size=(70, 8))
    keys[7] = keys[3]  # a tie is no miss
    np.savez(tmp_path / "qk.npz", h_keys=keys.astype(np.float32), h_queries=queries.astype(np.float32))
    (head,) = heads.read_heads(tmp_path / "qk.npz", 0.5)
    rows = torch.from_numpy(random.permuted(np.tile(np.arange(300), (70, 1)), axis=1)[:, :5].copy())
    rows[:, 4] = -1
    got = heads.Truth(head, 5).judge(rows)
    keys, queries = keys.astype(np.float32).astype(float), queries.astype(np.float32).astype(float)
    recall, mass_recall, mass = [], [], []
    for query, found in zip(queries, rows.tolist(), strict=True):
        scores = keys @ query
        weights = np.exp(scores / np.sqrt(8))
        best = np.sort(scores)[::-1][:5]
        own = [row for row in found if row >= 0]
        recall.append(sum(scores[row] >= best[-1] - 1e-5 for row in own) / 5)
        mass_recall.append(weights[own].sum() / np.exp(best / np.sqrt(8)).sum())
        mass.append(weights[own].sum() / weights.sum())
    want = {"recall": np.mean(recall), "mass_recall": np.mean(mass_recall), "mass": np.mean(mass)}
    assert got == pytest.approx(want, abs=1e-9)


def test_stretching_keeps_the_recorded_keys_and_repeats_few(heads):
    from lightning_fot.testing import real_qk

    entry = real_qk()["L10h0"]
    keys = entry["keys"][0, :1500]
    head = heads.Head("L10h0", keys, entry["queries"][0], None, len(keys), 0.5)
    longer = head.sized(4000)
    assert torch.equal(longer.keys[:1500], keys)
    assert longer.recorded == 1500
    # Two draws of one key in one cell may be moved alike, if seldom.
    assert len(longer.keys.unique(dim=0)) > 3950
    assert longer.keys.mean(0).sub(keys.mean(0)).norm() < 0.05 * keys.mean(0).norm()
    assert len(head.sized(100).keys) == head.sized(100).recorded == 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sections", "f"], "--sections"),
        (["--retrievers", "exat"], "exact"),
        (["--repeats", "0"], "--repeats"),
        (["--tokens", "3"], "--tokens"),
        (["--heads", "L99"], "L10h0"),
        (["--keys", "no-such-file.npz"], "--keys"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, named, monkeypatch, capsys):
    assert named in refused(SCRIPT, arguments, monkeypatch, capsys)
