"""Where the time of reading and answering goes: the model, searches, storing of pairs, building of indexes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch

from lightning_fot.evaluation.speed.timing import synchronise

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory

PARTS = ("model_s", "search_s", "insert_s", "build_s")
"""Parts of a row of ``time_split``; together they are its ``seconds``."""


@dataclass(frozen=True)
class Split:
    """Seconds, by what they went into.

    Args:
        seconds: Wall time of all.
        search_s: In searches of the retrievers, waiting for indexes excluded.
        insert_s: In taking pairs into the memory.
        build_s: Waiting for indexes to be built or extended.
        beside_s: Building that went on beside the rest, in another thread; not a part of ``seconds``, though it slows
            them where cores are few.
    """

    seconds: float = 0.0
    search_s: float = 0.0
    insert_s: float = 0.0
    build_s: float = 0.0
    beside_s: float = 0.0

    @property
    def model_s(self) -> float:
        """All the rest: the backbone, and attention over what was found, gathering of pairs included."""
        return max(0.0, self.seconds - self.search_s - self.insert_s - self.build_s)

    def __add__(self, other: Split) -> Split:
        return Split(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: Split) -> Split:
        return Split(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def as_dict(self) -> dict[str, float]:
        """JSON-able fields, those of a row."""
        return {**asdict(self), "model_s": self.model_s}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """From what :meth:`as_dict` gave."""
        return cls(*(float(row[field.name]) for field in fields(cls)))


def spent(memory: Memory) -> Split:
    """What a memory did since it was made or copied; ``seconds``, which only its caller knows, is 0."""
    stats = [layer.retriever.stats() for layer in memory.layers.values()]
    waited = sum(one.wait_seconds for one in stats)
    return Split(
        0.0,
        sum(one.search_seconds for one in stats),
        memory.append_seconds,
        waited,
        max(0.0, sum(one.build_seconds for one in stats) - waited),
    )


class Stopwatch:
    """Adds up the time of several stretches of reading or answering.

    On a GPU the total is exact, while a search counts only until its work is queued: the rest of it is seen as the
    model's.

    Args:
        device: Where the model computes.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> with watch.running():
        ...     total = sum(range(1000))
        >>> watch.split.seconds == watch.split.model_s > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.split = Split()
        self._device = device

    @contextmanager
    def running(self, memory: Memory | None = None) -> Iterator[None]:
        """Counts the block's time, and of it what ``memory`` does inside."""
        before = None if memory is None else spent(memory)
        synchronise(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self._device)
            self.split += Split(time.perf_counter() - began)
            if memory is not None and before is not None:
                self.split += spent(memory) - before

    def count(self, memory: Memory) -> None:
        """Takes what a memory did since it was made or copied, within a block that is running without it."""
        self.split += spent(memory)


def split_rows(
    task: str, memory: str, context_tokens: int, record: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of ``time_split`` from the rows of a phase, one a step; steps that were not timed are left out.

    Args:
        task: What was measured.
        memory: Memory kind.
        context_tokens: Tokens in memory.
        record: Rows with ``splits``: by step, its tokens and :meth:`Split.as_dict`.
    """
    found: dict[str, tuple[int, Split]] = {}
    for row in record:
        for step, part in row.get("splits", {}).items():
            tokens, split = found.get(step, (0, Split()))
            found[step] = (tokens + part["tokens"], split + Split.of(part))
    return [
        {
            "step": step,
            "task": task,
            "context_tokens": context_tokens,
            "memory": memory,
            "tokens": tokens,
            **split.as_dict(),
        }
        for step, (tokens, split) in found.items()
        if tokens
    ]
