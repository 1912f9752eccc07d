"""The whole job on a tiny random model: results, stopping, going on."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.slow

# Small enough for a few seconds; the documents are written by the test.
_SETTINGS = [
    "--evaluation.context_tokens=[256]",
    "--evaluation.target_tokens=128",
    "--evaluation.passkey_tokens=[]",
    "--evaluation.retrieval_repeats=1",
    "--model.memory.retriever.min_index_size=128",
    "--data.paths=[books]",
    "--data.max_documents=null",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few documents."""
    books = tmp_path / "books"
    books.mkdir()
    for number in range(4):
        text = " ".join(f"word{(number * 7 + place * place) % 97}" for place in range(900))
        (books / f"book{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def _words(*words: str) -> list[str]:
    return [sys.executable, "-m", "lightning_fot", *words]


def _environment(repository: Path) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(repository), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}


def _call(repository: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _words(*words), cwd=folder, env=_environment(repository), capture_output=True, text=True, timeout=PATIENCE_S
    )


def _interrupt(repository: Path, folder: Path, seen: str, number: int, *words: str) -> tuple[int, str]:
    """Runs until a line contains ``seen``, then sends a signal; gives exit code and all that was said."""
    process = subprocess.Popen(
        _words(*words),
        cwd=folder,
        env=_environment(repository),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.append(line)
            if seen in line:
                break
        process.send_signal(number)
        said.append(process.stdout.read())
    return process.wait(timeout=PATIENCE_S), "".join(said)


def _results(folder: Path, run: str) -> Any:
    return json.loads((folder / run / "results.json").read_text(encoding="utf-8"))


def _resume_words(said: str) -> list[str]:
    line = next(line for line in said.splitlines() if "--ckpt_path=last" in line)
    return shlex.split(line)[3:]


def test_the_whole_path(repository: Path, folder: Path) -> None:
    done = _call(repository, folder, "run", "--config", "smoke", *_SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    run = folder / "runs" / "smoke"
    for name in ("config.yaml", "metrics.csv", "report.html", "recall_vs_speed.png", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0, name
    results = _results(folder, "runs/smoke")
    assert results["schema"] == 1
    assert results["complete"]
    assert results["training"]["steps"] == 6
    assert results["training"]["tokens"] == 6 * 4 * 64
    assert results["environment"]["versions"]["torch"]
    assert results["config"]["model"]["memory"]["retriever"]["name"] == "hnsw"
    kinds = {(row["memory"], row["context_tokens"]) for row in results["perplexity"]}
    assert {("none", 256), ("exact", 256), ("hnsw", 256)} <= kinds
    assert results["retrieval"]
    assert results["exact"]
    with (run / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, 1, 2, 3, 4, 5]
    # Progress went to standard error, results to standard output.
    assert "left" in done.stderr
    assert "Perplexity" in done.stdout
    # Once more, from the run's own configuration, without training: another folder.
    again = _call(repository, folder, "run", "--config", "runs/smoke/config.yaml", "--trainer.max_steps=0")
    assert again.returncode == 0, again.stderr
    assert "runs/smoke-2" in again.stderr
    untrained = _results(folder, "runs/smoke-2")
    assert untrained["training"]["steps"] == 0
    assert (folder / "runs/smoke-2/metrics.csv").read_text().startswith("step,")
    assert _results(folder, "runs/smoke")["seconds"] == results["seconds"]
    # A finished run goes on to its end at once: all phases are kept.
    last = _call(repository, folder, "run", "--config", "smoke", *_SETTINGS, "--ckpt_path=last", "--run_dir=runs/smoke")
    assert last.returncode == 0, last.stderr
    assert "Training ended after 6 steps" in last.stderr
    assert "already done" in last.stderr
    assert _results(folder, "runs/smoke")["perplexity"] == results["perplexity"]
    # The trained weights are what validate reads.
    found = _call(repository, folder, "validate", "--config", "smoke", *_SETTINGS, "--ckpt_path=last")
    assert found.returncode == 0, found.stderr
    assert re.search(r"val/loss: \d", found.stdout)


def test_stopped_while_training_goes_on_as_if_it_had_not(repository: Path, folder: Path) -> None:
    words = ["run", "--config", "smoke", *_SETTINGS, "--trainer.max_steps=60"]
    whole = _call(repository, folder, *words, "--run_dir=whole")
    assert whole.returncode == 0, whole.stderr
    code, said = _interrupt(repository, folder, "] train;", signal.SIGINT, *words, "--run_dir=cut")
    assert code == 130, said
    assert "Traceback" not in said
    assert "Kept: the checkpoint cut/checkpoints/last.ckpt" in said
    assert not (folder / "cut" / "results.json").exists()
    before = (folder / "cut" / "metrics.csv").read_text().splitlines()
    assert 1 <= len(before) - 1 < 60
    done = _call(repository, folder, *_resume_words(said))
    assert done.returncode == 0, done.stderr
    assert f"Training goes on after step {len(before) - 1} of 60" in done.stderr
    cut, uncut = (_metrics(folder / run) for run in ("cut", "whole"))
    assert cut == pytest.approx(uncut)
    one, other = _results(folder, "cut")["training"], _results(folder, "whole")["training"]
    assert (one["steps"], one["tokens"]) == (other["steps"], other["tokens"]) == (60, 60 * 256)
    assert one["loss_first"] == pytest.approx(other["loss_first"])
    assert _results(folder, "cut")["perplexity"][0]["value"] == pytest.approx(
        _results(folder, "whole")["perplexity"][0]["value"], rel=1e-4
    )


def _metrics(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("steps", [0, 2])
def test_stopped_while_evaluating_keeps_finished_phases(repository: Path, folder: Path, steps: int) -> None:
    words = ["run", "--config", "smoke", *_SETTINGS, f"--trainer.max_steps={steps}", "--run_dir=cut"]
    code, said = _interrupt(repository, folder, "perplexity: hnsw, 256 tokens;", signal.SIGTERM, *words)
    assert code == 143, said
    assert "finished phases of the evaluation" in said
    partial = _results(folder, "cut")
    assert not partial["complete"]
    assert partial["perplexity"][0]["memory"] == "none"
    done = _call(repository, folder, *_resume_words(said))
    assert done.returncode == 0, done.stderr
    assert "1 phases of the evaluation are already done" in done.stderr
    results = _results(folder, "cut")
    assert results["complete"]
    assert results["training"]["steps"] == steps
    assert results["perplexity"][0] == partial["perplexity"][0]


def test_stopped_before_anything_is_done(repository: Path, folder: Path) -> None:
    code, said = _interrupt(
        repository, folder, "shipped with lightning-fot", signal.SIGINT, "run", "--config", "smoke", *_SETTINGS
    )
    assert code == 130, said
    assert "Traceback" not in said
    done = _call(repository, folder, "run", "--config", "smoke", *_SETTINGS, "--ckpt_path=last")
    assert done.returncode == 2
    assert "ckpt_path='last'" in done.stderr


def test_fit_then_go_on_for_more_steps(repository: Path, folder: Path) -> None:
    words = ["fit", "--config", "smoke", *_SETTINGS]
    done = _call(repository, folder, *words, "--trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "Trained 2 steps" in done.stdout
    assert not (folder / "runs/smoke/results.json").exists()
    more = _call(
        repository, folder, "fit", "--config", "smoke", *_SETTINGS, "--trainer.max_steps=5", "--ckpt_path=last"
    )
    assert more.returncode == 0, more.stderr
    assert "trainer.max_steps 2 → 5" in more.stderr
    assert "Trained 5 steps" in more.stdout
    assert len(_metrics(folder / "runs/smoke")) == 5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--evaluation.context_tokens=[100000]"], ["evaluation.context_tokens=[100000]", "the longest of"]),
        (["--model.memory.window=8192", "--data.paths=[books/book0.txt]"], ["data.paths"]),
        (["--data.paths=[empty.txt]"], ["data.paths", "empty"]),
        (["--data.paths=[binary.txt]"], ["data.paths"]),
        (["--evaluation.passkey_tokens=[100]"], ["evaluation.passkey_tokens=100", "Use 256 or more"]),
        (["--evaluation.needles.tokens=[100]"], ["evaluation.needles.tokens=[100]", "without any filler"]),
    ],
)
def test_what_does_not_do_is_refused_before_a_model_is_read(
    repository: Path, folder: Path, words: list[str], parts: list[str]
) -> None:
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    done = _call(repository, folder, "run", "--config", "smoke", *_SETTINGS, *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    for part in parts:
        assert part in line
    assert "] model" not in done.stderr
    # A run that did nothing leaves nothing that the next one would have to avoid.
    assert not (folder / "runs" / "smoke").exists()
