"""Short answers are short: no torch, no Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_fot
from lightning_fot.cli import main
from tests.support.patience import PATIENCE_S

_PROBE = """
import sys
from lightning_fot.cli import main
code = main({words!r})
heavy = [name for name in ("torch", "lightning", "transformers", "matplotlib", "faiss") if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


def _probe(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROBE.format(words=words)], capture_output=True, text=True, cwd=cwd, timeout=PATIENCE_S
    )


@pytest.mark.parametrize(
    ("words", "expected"), [(["--help"], "retrievers"), (["--version"], "."), (["retrievers"], "hnsw")]
)
def test_answers_without_torch(repository: Path, words: list[str], expected: str) -> None:
    # What takes time is importing: see the probe.
    done = _probe(words, repository)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run"], ["config"]),
        (["run", "--config", "smoke", "--run_dir=/dev/null/x"], ["run_dir"]),
        (["run", "--config", "smokee"], ["config='smokee'", "Did you mean smoke?"]),
        (["run", "--config", "smoke", "--model.memory.topk=3"], ["model.memory.topk=3", "model.memory.top_k?"]),
        (["run", "--config", "smoke", "--trainer.max_step=3"], ["trainer.max_step=3", "trainer.max_steps?"]),
        (["run", "--config", "smoke", "--data.batch_sze=3"], ["data.batch_sze=3", "data.batch_size?"]),
        (["run", "--config", "smoke", "--model.memory.retriever=hnws"], ["model.memory.retriever", "hnsw"]),
        (
            ["run", "--config", "smoke", "--model.memory.memory_layers=[4]"],
            ["model.memory.memory_layers=[4]", "4 layers"],
        ),
        (["run", "--config", "smoke", "--data.paths=[nowhere]"], ["data.paths", "nowhere"]),
        (["run", "--config", "smoke", "--evaluation.distractor_paths=[nowhere]"], ["without distractor_tokens"]),
        (
            [
                "run",
                "--config",
                "smoke",
                *(f"--evaluation.distractor_{one}" for one in ("tokens=[9]", "paths=[nowhere]")),
            ],
            ["evaluation.distractor_paths", "nowhere"],
        ),
        (["run", "--config", "smoke", "--model.backbone=./nowhere"], ["model.backbone", "nowhere"]),
        (["run", "--config", "smoke", "--ckpt_path=last", "--run_dir=nowhere"], ["ckpt_path='last'", "nowhere"]),
        (["run", "--config", "smoke", "stray"], ["'stray'"]),
        (["rnu"], ["verb='rnu'", "Did you mean run?"]),
        (["predict", "--config", "smoke"], ["predict", "generate"]),
        (["doctor", "--x"], ["--x"]),
    ],
)
def test_mistakes_are_told_before_torch(repository: Path, words: list[str], parts: list[str]) -> None:
    done = _probe(words, repository)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    for part in parts:
        assert part in line


def test_debug_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smokee"):
        main(["run", "--config", "smokee", "--debug"])


def test_the_three_names_are_one_program(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_fot", "--version"],
        capture_output=True,
        text=True,
        cwd=repository,
        timeout=PATIENCE_S,
    )
    assert done.stdout.strip() == f"lightning-fot {lightning_fot.__version__}"
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert 'lightning-fot = "lightning_fot.cli:main"' in text
    assert 'lightning = "lightning_fot._shim:main"' in text


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(words: list[str], debug: bool) -> int:
        raise OSError(28, "No space left on device", "runs/x/last.ckpt")

    monkeypatch.setattr("lightning_fot.cli._dispatch", full)
    assert main(["run"]) == 2
    assert "runs/x/last.ckpt: No space left on device. Make room" in capsys.readouterr().err
