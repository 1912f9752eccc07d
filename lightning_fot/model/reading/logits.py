"""Collects what a call gives back while windows are read: the logits asked for, and the loss of all of them.

Only what is asked for is held: the logits of a text of 256k tokens and a vocabulary of 49k are 50 GB in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fot.config.data import IGNORED
from lightning_fot.model.reading.inputs import beyond

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def head_of(model: PreTrainedModel, wanted: Tensor | None) -> Iterator[None]:
    """Inside the block the model's output layer is given the wanted tokens alone.

    Args:
        model: Its output layer takes hidden states (B, T, width), and what follows it treats each token alone.
        wanted: (B, T) bool; the logits then are (1, N, vocabulary), row by row. None changes nothing.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if wanted is None or head is None:
        yield
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][wanted.to(args[0].device)][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class LogitsCollector:
    """Takes the logits of windows in their order; tokens lie first in each row, as they are read.

    Args:
        length: T, tokens and padding of a row.
        lengths: (B,) tokens of each row.
        places: (B, T) column that each place came from; None where rows have no padding.
        labels: (B, T) int64 by column, or None where no loss is wanted.
        keep: Logits wanted, of the last columns; 0 means all.
        device: Where logits lie.
    """

    def __init__(
        self,
        length: int,
        lengths: Tensor,
        places: Tensor | None,
        labels: Tensor | None,
        keep: int,
        device: torch.device,
    ) -> None:
        self._kept_from = length - min(keep or length, length)
        self._wanted: Tensor | None = None
        self.read_from = self._kept_from
        """The first place whose logits are needed."""
        if places is not None:
            wanted = places.argsort(1)[:, self._kept_from :]
            # Columns of padding get zeros.
            self._wanted = wanted.masked_fill(wanted >= lengths.to(device)[:, None], -1)
            # At least one logit is read: its size and dtype are needed where all wanted columns are padding.
            self.read_from = int(wanted[self._wanted >= 0].min()) if bool((self._wanted >= 0).any()) else length - 1
        self._targets = None
        if labels is not None:
            self.read_from = 0
            if places is not None:
                labels = torch.gather(labels, 1, places)
            shifted = labels.masked_fill(beyond(lengths, length, device), IGNORED)[:, 1:]
            # The last token of a window predicts the first of the next; the last of all predicts nothing.
            self._targets = F.pad(shifted, (0, 1), value=IGNORED)
        self._parts: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._next = self.read_from

    def add(self, logits: Tensor) -> None:
        """Takes the logits (B, n, V) of the next n places."""
        start, stop = self._next, self._next + logits.shape[1]
        self._next = stop
        if self._targets is not None:
            targets = self._targets[:, start:stop]
            self._losses.append(
                F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            )
        if self._wanted is None:
            first = max(0, self._kept_from - start)
            if first == 0:
                self._parts.append(logits)
            elif first < logits.shape[1]:
                # A copy: a view would keep the whole window alive.
                self._parts.append(logits[:, first:].clone())
            return
        if not self._parts:
            self._parts.append(logits.new_zeros(*self._wanted.shape, logits.shape[-1]))
        rows, columns = ((self._wanted >= start) & (self._wanted < stop)).nonzero(as_tuple=True)
        self._parts[0][rows, columns] = logits[rows, self._wanted[rows, columns] - start]

    def logits(self) -> Tensor:
        """(B, T or keep, V) by column; zeros at padding."""
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)

    def loss(self) -> Tensor | None:
        """Mean over the targets in nats; nan where there is none, as in transformers; None without labels."""
        if self._targets is None:
            return None
        return torch.stack(self._losses).sum() / (self._targets != IGNORED).sum()
