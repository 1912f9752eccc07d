"""The iterable that Lightning trains on, and the count of what it has consumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_fot.data.rows.plan import BatchSequence

Batch = dict[str, torch.Tensor]


class TrainPosition:
    """How many training batches are completed.

    Lightning fetches one batch ahead, so with a trainer its own count of processed batches tells, not what was taken.
    """

    def __init__(self) -> None:
        self._base = 0
        self._taken = 0
        self._trainer: pl.Trainer | None = None
        self._before: int | None = None

    def attach(self, trainer: pl.Trainer | None) -> None:
        """Start from zero under a new trainer; ``restore`` comes after, when it resumes."""
        if trainer is not self._trainer:
            self._base, self._taken, self._before = 0, 0, None
            self._trainer = trainer

    def restore(self, batches: int) -> None:
        """Go on after so many batches."""
        self._base, self._taken, self._before = batches, 0, None

    def begin(self) -> int:
        """Called when an iteration starts; returns the batch to start with."""
        self._base = self.consumed()
        self._taken = 0
        self._before = self._processed()
        return self._base

    def take(self) -> None:
        """Called for each batch that is handed out."""
        self._taken += 1

    def consumed(self) -> int:
        """Batches that training has completed."""
        processed = self._processed()
        if processed is None:
            return self._base + self._taken
        return self._base if self._before is None else self._base + processed - self._before

    def _processed(self) -> int | None:
        if self._trainer is None:
            return None
        # Typed by Lightning as a tracker without this count, which it has.
        total: Any = self._trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)


class RowLoader:
    """Iterates over batches. Not a ``DataLoader``, so that Lightning puts no (shuffling) sampler into it."""

    def __init__(self, sequence: BatchSequence, position: TrainPosition | None) -> None:
        self._sequence = sequence
        self._position = position

    def __iter__(self) -> Iterator[Batch]:
        self._sequence.seek(0 if self._position is None else self._position.begin())
        while True:
            try:
                batch = self._sequence.next()
            except StopIteration:
                return
            ended = self._sequence.epoch_ended
            if self._position is not None:
                self._position.take()
            yield to_tensors(batch)
            if ended:
                return

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the position. That this exists tells Lightning that resuming is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load, see ``state_dict``."""


def to_tensors(batch: dict[str, Any]) -> Batch:
    """Arrays of a batch as tensors of the same dtype."""
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
