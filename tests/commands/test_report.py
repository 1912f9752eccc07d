"""``lightning report``: pages rebuilt from results, runs compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.cli import main
from tests.support.report_results import FULL


def _folder(path: Path, **changes: Any) -> Path:
    results = copy.deepcopy(FULL)
    results["config"]["model"]["memory"] |= changes
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return path


@pytest.mark.slow
def test_rebuilds_the_page_of_each_run(tmp_path, capsys):
    folders = [_folder(tmp_path / name / "hnsw") for name in ("a", "b")]
    assert main(["report", *map(str, folders)]) == 0
    for folder in folders:
        assert str(folder / "report.html") in capsys.readouterr().out or (folder / "report.html").is_file()


@pytest.mark.slow
def test_compares_runs_on_one_page(tmp_path, capsys):
    folders = [_folder(tmp_path / "a" / "hnsw", top_k=16), _folder(tmp_path / "b" / "hnsw", top_k=64)]
    out = tmp_path / "both"
    assert main(["report", *map(str, folders), f"--out={out}", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers) == ["a/hnsw", "b/hnsw"]
    longest = max(row["context_tokens"] for row in FULL["perplexity"])
    for row in FULL["perplexity"]:
        if row["context_tokens"] == longest:
            assert numbers["a/hnsw"][f"perplexity, {row['memory']}"] == row["value"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "a/hnsw" in page
    assert "b/hnsw" in page
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["sweep"]["runs"]
    assert [row["model.memory.top_k"] for row in rows] == [16, 64]
    assert not (folders[0] / "report.html").exists()
    # Made again, it takes the place of the old one; a run's folder is never written over.
    assert main(["report", *map(str, folders), f"--out={out}"]) == 0
    assert main(["report", *map(str, folders), f"--out={folders[0]}"]) == 2


@pytest.mark.parametrize("words", [["report"], ["report", "nowhere"], ["report", ".", "."]])
def test_what_cannot_be_shown_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "lightning-fot: error" in capsys.readouterr().err
