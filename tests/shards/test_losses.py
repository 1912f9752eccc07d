"""Shards that die at any moment: nothing is lost, and no answer is wrong."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot.errors import SettingError
from lightning_fot.memory.found import Attended, Scoring
from lightning_fot.shards import engine
from lightning_fot.system.signals import Stopped
from tests.support import shards
from tests.support.patience import PATIENCE_S
from tests.support.shards import attended, contents, new_memory, read_text

# Shards of their own: others are not to die with them.
MORTAL = {"count": 2, "cpus": 0, "name": "mortal"}


def kill(where: Any, shard: int) -> None:
    """As a machine that fails does it: without a word."""
    pid = where.group.answer(where.group.ask(shard, "process"))
    os.kill(pid, signal.SIGKILL)


def check(own: Any, other: Any, seed: int) -> None:
    """All that is held, and an answer."""
    assert own.lengths.tolist() == other.lengths.tolist()
    queries = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(seed))
    for number, layer in own.layers.items():
        plain = other.layers[number]
        found = layer.read(queries, 9, 0, Scoring(0.5))
        if len(other):
            assert isinstance(found, Attended)
            out, lse = attended(plain.keys, plain.values, plain.lengths, queries, 9, 0.5)
            torch.testing.assert_close(found.out.double(), out, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(found.lse.double(), lse, atol=1e-4, rtol=1e-3)
        for mine, theirs in zip(contents(layer), contents(plain), strict=True):
            for got, want in zip(mine, theirs, strict=True):
                assert torch.equal(got, want)


def struck(folder: Path, strikes: int, seed: int) -> int:
    """Changes and asks a memory while shards are killed; gives how many were."""
    draw = random.Random(seed)
    where: Any = shards.place(MORTAL)
    like = shards.shape()
    own, other = new_memory(where, like, 2, capacity=200), new_memory(None, like, 2, capacity=200)
    began, step = where.group.losses, 0
    while where.group.losses - began < strikes:
        step += 1
        at_once = draw.random() < 0.5
        victim = draw.randrange(2)
        killer = threading.Thread(target=kill, args=(where, victim))
        killer.start()
        if at_once:
            killer.join()
        kind, number = draw.choice(["read", "read", "forget", "save", "load", "ask"]), draw.getrandbits(30)
        if kind == "read":
            for memory in (own, other):
                read_text(memory, [number % 23 + 1, number % 7 + 1], number, draw.choice("a") + str(number % 3))
        elif kind == "forget" and other.documents:
            name = other.documents[number % len(other.documents)].name
            assert own.forget(name) == other.forget(name)
        elif kind == "save":
            own.save(folder)
        elif kind == "load" and (folder / "memory.json").exists():
            # What goes on after a save rests on its files.
            other_copy, own_copy = other.snapshot(), own.snapshot()
            check(own_copy, other_copy, number)
        check(own, other, number)
        killer.join()
    check(own, other, 0)
    return int(where.group.losses - began)


@pytest.mark.slow
def test_shards_that_die_are_made_again(cluster: Any, tmp_path: Path) -> None:
    assert struck(tmp_path, 2, 0) >= 2


@pytest.mark.robustness_long
def test_forty_strikes(cluster: Any, tmp_path: Path) -> None:
    assert struck(tmp_path, 40, 1) >= 40


@pytest.mark.slow
def test_what_cannot_be_made_again_is_told(cluster: Any, tmp_path: Path) -> None:
    where: Any = shards.place(MORTAL)
    memory = new_memory(where, shards.shape(), 2)
    read_text(memory, [20, 20], 0)
    read_text(memory, [20, 20], 1)
    memory.save(tmp_path)
    shutil.rmtree(tmp_path)
    kill(where, 1)
    with pytest.raises(SettingError, match=r"shard 1 is lost.*lightning ingest NAME PATH"):
        memory.layers[1].read(torch.randn(2, 2, 4, 8), 9, 0, Scoring(0.5))
    del memory
    # Others do not suffer: what is not held any more is not made again.
    again = new_memory(where, shards.shape(), 2)
    read_text(again, [20, 20], 0)
    read_text(again, [20, 20], 1)
    other = new_memory(None, shards.shape(), 2)
    read_text(other, [20, 20], 0)
    read_text(other, [20, 20], 1)
    check(again, other, 3)


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param(lambda ray, call: engine.wait(ray, [call], 1, PATIENCE_S), id="wait"),
        pytest.param(engine.result, id="result"),
    ],
)
def test_what_a_signal_raises_while_ray_waits_arrives(cluster: Any, waits: Any) -> None:
    def handler(number: int, frame: Any) -> None:
        raise Stopped(number)

    endless = cluster.remote(lambda: time.sleep(3600)).options(num_cpus=0).remote()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(Stopped):
            waits(cluster, endless)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        cluster.cancel(endless, force=True)
