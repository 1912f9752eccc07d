"""bench, retrievers and doctor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_fot.cli import main
from lightning_fot.commands import doctor


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Keys and queries of two heads in one file."""
    generator = np.random.default_rng(0)
    arrays = {
        f"L{layer}_{kind}": generator.normal(size=(count, 16)).astype(np.float32)
        for layer in (1, 3)
        for kind, count in (("keys", 600), ("queries", 24), ("past_queries", 50))
    }
    path = tmp_path / "qk.npz"
    np.savez(path, **arrays)
    return path


def test_bench_prints_a_table(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(recorded), "--retriever", "hnsw", "--repeats", "1"]) == 0
    said = capsys.readouterr()
    assert "hnsw ef_search=256" in said.out
    assert "L1, 600 keys" in said.out
    assert "L3, 600 keys" in said.out
    assert "left" in said.err


@pytest.mark.slow
def test_bench_writes_json(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(recorded), "--retriever", '{"name": "hnsw", "M": 4}', "--k", "8", "--repeats", "1"]
    assert main([*words, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["retriever"] for row in rows} == {"exact", "hnsw"}
    assert {row["keys"] for row in rows} == {"L1", "L3"}
    assert all(row["k"] == 8 for row in rows)
    assert all(row["recall"] == 1 for row in rows if row["retriever"] == "exact")
    assert all(row["index_used"] for row in rows)
    assert all(row["args"]["M"] == 4 for row in rows if row["retriever"] == "hnsw")
    assert main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)


def test_bench_takes_retriever_and_k_from_a_configuration(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(recorded), "--config", "smoke", "--repeats", "1", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["k"] for row in rows} == {16}
    assert {row["args"].get("M") for row in rows if row["retriever"] == "hnsw"} == {8}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere.npz"], "file='nowhere.npz': no such file"),
        (["--retriever", "hnws"], "hnws"),
        (["--retriever", "{name: x"], "is not JSON"),
        (["--k", "0"], "k=0: must be a whole number of at least 1"),
        (["--k", "many"], "k='many': must be a whole number"),
        (["--repeat", "3"], "--repeat=None: is not an option of bench. Did you mean --repeats?"),
        (["--config", "nowhere"], "config='nowhere'"),
    ],
)
def test_bench_refuses(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert part in capsys.readouterr().err


def test_bench_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "--retriever" in capsys.readouterr().out


def test_retrievers_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrievers"]) == 0
    said = capsys.readouterr().out
    for name in ("exact", "faiss_ivf", "hnsw", "scann", "built-in"):
        assert name in said


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in ("torch", "script lightning", "threads", "self-test: passed"):
        assert part in said


def test_doctor_fails_with_its_self_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda: (False, "memory differs by 1"))
    assert main(["doctor"]) == 1
    assert "FAILED (memory differs by 1)" in capsys.readouterr().out


def test_who_owns_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "not on PATH" in doctor.script_owner()
    script = tmp_path / "lightning"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(script))
    script.write_text("from lightning_sdk.cli import main", encoding="utf-8")
    assert "another distribution's" in doctor.script_owner()
    script.write_text("from lightning_fot._shim import main", encoding="utf-8")
    assert "lightning-fot's" in doctor.script_owner()
    monkeypatch.setenv("LIGHTNING_FOT_NO_SHIM", "1")
    assert "switched off" in doctor.script_owner()
