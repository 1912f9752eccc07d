"""One stream of text out of batches that hold several."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fot.config.crossbatch import CrossbatchConfig


class TextStream:
    """The text of each batch's first pack or row (``paper``), which goes on from batch to batch.

    Args:
        most: Tokens kept.
        newest: Keep the newest tokens; by default the first ones, so that every pass over the data gives the same.
    """

    def __init__(self, most: int, newest: bool = False) -> None:
        self.most = most
        self.newest = newest
        self.clear()

    def clear(self) -> None:
        """Forgets the text."""
        self.ids = torch.zeros(1, 0, dtype=torch.int64)
        """(1, n) int64 on the CPU, n at most ``most``."""

    @property
    def full(self) -> bool:
        """Whether there are as many tokens as are kept."""
        return self.ids.shape[1] == self.most

    def extend(self, input_ids: Tensor, config: CrossbatchConfig) -> None:
        """Takes the first stream of a batch (B, T)."""
        if self.full and not self.newest:
            return
        text = torch.cat([self.ids, input_ids[: config.rows_of_a_text].reshape(1, -1).cpu()], dim=1)
        self.ids = text[:, -self.most :] if self.newest else text[:, : self.most]
