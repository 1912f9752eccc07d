"""A training that is killed (SIGKILL) at any moment, and resumed, ends with the weights of one that was not."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.patience import PATIENCE_S

STEPS_A_KILL = 16
_SETTINGS = [
    "--trainer.accumulate_grad_batches=1",
    "--data.paths=[books]",
    "--data.max_documents=null",
    "--model.optimizer.init_args.lr=3e-3",
]


def _kill_myself(moment: str, write: int) -> None:
    """SIGKILL in the write of the checkpoint with this number: a watcher from outside would miss most of them.

    Lightning moves the file in from the folder for temporary files, on another disk by copying.
    Moments: "begun", a part of the copy is there; "complete", all of it, under its first name.
    """
    ahead = write

    def at(event: str, words: tuple[Any, ...]) -> None:
        nonlocal ahead
        if event != "os.rename":
            return
        place = Path(words[moment == "begun"])
        if place.name != "last.ckpt" or place.parent.suffix != ".part":
            return
        if ahead == 0:
            if moment == "begun":  # the event comes before the move
                Path(words[1]).write_bytes(Path(words[0]).read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        ahead -= 1

    sys.addaudithook(at)


def _train(home: str, resume: bool, steps: int, moment: str | None, write: int) -> None:
    """Runs in a process of its own, forked from a server that has imported torch but computed nothing."""
    os.chdir(home)
    with open("log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from lightning_fot.cli import main
    from lightning_fot.training import job_callbacks

    torch.set_num_threads(1)
    if moment is not None:
        _kill_myself(moment, write)
    # A checkpoint after each step: the more often one is written, the more often a kill meets one.
    job_callbacks.SAVE_EVERY_S = 0.0
    words = ["fit", "--config", "smoke", "--run_dir=out", f"--trainer.max_steps={steps}", *_SETTINGS]
    code = main([*words, "--ckpt_path=last"] if resume else words)
    os._exit(code)


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lightning_fot.commands.job.job", "lightning_fot.pretrained", "lightning_fot.commands.job.parsing"]
    )
    return context


def _home(path: Path) -> Path:
    books = path / "books"
    books.mkdir(parents=True)
    for number in range(4):
        text = " ".join(f"word{(number * 7 + place * place) % 97}" for place in range(1500))
        (books / f"book{number}.txt").write_text(text, encoding="utf-8")
    return path


def _start(server: Any, home: Path, steps: int, moment: str | None = None, write: int = 0) -> BaseProcess:
    out = home / "out"
    resume = (out / "checkpoints" / "last.ckpt").is_file()
    if not resume and out.exists():
        shutil.rmtree(out)  # killed before there was anything to go on from
    process: BaseProcess = server.Process(target=_train, args=(str(home), resume, steps, moment, write))
    process.start()
    return process


def _kill(process: BaseProcess) -> bool:
    """Whether it was still at work."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _finish(server: Any, home: Path, steps: int) -> dict[str, Any]:
    process = _start(server, home, steps)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (home / "log.txt").read_text()[-3000:]
    found: dict[str, Any] = torch.load(home / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _wait_for_steps(process: BaseProcess, checkpoint: Path, steps: int) -> None:
    """Until the checkpoint has been replaced so often."""
    seen = 0
    before = _stamp(checkpoint)
    while process.is_alive() and seen < steps:
        now = _stamp(checkpoint)
        seen, before = seen + (now != before), now
        time.sleep(0.001)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_ino, found.st_mtime_ns)


def _kill_and_compare(server: Any, folder: Path, kills: int) -> None:
    steps = STEPS_A_KILL * kills
    expected = _finish(server, _home(folder / "undisturbed"), steps)
    assert expected["global_step"] == steps
    home, draw = _home(folder / "killed"), random.Random(kills)
    checkpoints = home / "out" / "checkpoints"
    killed = writing = 0
    for number in range(kills):
        for left in checkpoints.glob(".last.ckpt.*.part"):
            shutil.rmtree(left)
        if number % 4 == 0:
            moment = ("begun", "complete")[number // 4 % 2]
            process = _start(server, home, steps, moment, write=draw.randrange(3))
            process.join(PATIENCE_S)
            writing += any(checkpoints.glob(".last.ckpt.*.part/last.ckpt"))
        elif number % 4 == 1:
            # While it starts.
            process = _start(server, home, steps)
            process.join(0.6 * draw.random())
        else:
            process = _start(server, home, steps)
            _wait_for_steps(process, checkpoints / "last.ckpt", draw.randint(1, STEPS_A_KILL // 2))
            process.join(0.05 * draw.random())
        killed += _kill(process)
    found = _finish(server, home, steps)
    assert killed == kills
    assert writing == math.ceil(kills / 4)
    assert sorted(found) == sorted(expected)
    for section in expected:
        if section != "callbacks":  # they count seconds
            assert _same(found[section], expected[section]), section


@pytest.mark.slow
def test_three_kills(server, tmp_path):
    _kill_and_compare(server, tmp_path, kills=3)


@pytest.mark.slow
def test_twenty_kills(server, tmp_path):
    _kill_and_compare(server, tmp_path, kills=20)
