"""Rows that a retriever must not return any more: kept as a mask until the owner of the keys drops them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fot.errors import SettingError

# More than the share removed: those nearest to a query may well lie together.
_MARGIN = 1.5


class Removed:
    """For each bank which rows were removed. Masks are replaced, never changed: snapshots share them.

    Args:
        banks: Number of banks.
    """

    def __init__(self, banks: int) -> None:
        self._masks: list[Tensor | None] = [None] * banks
        self._counts = [0] * banks

    @property
    def any(self) -> bool:
        """Whether any row of any bank was removed."""
        return any(self._counts)

    def count(self, bank: int) -> int:
        """Rows removed from a bank."""
        return self._counts[bank]

    def mask(self, bank: int) -> Tensor | None:
        """(m,) bool, True for removed rows; rows from m on are there. None where nothing was removed."""
        return self._masks[bank]

    def of(self, bank: int, rows: Tensor) -> Tensor:
        """Which of ``rows`` (any shape, -1 for none) were removed, bool."""
        mask = self._masks[bank]
        if mask is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        inside = (rows >= 0) & (rows < len(mask))
        return inside & mask.to(rows.device)[rows.clamp(0, len(mask) - 1)]

    def add(self, rows: Sequence[Tensor | None], lengths: Sequence[int]) -> None:
        """Removes row numbers (n,) of each bank, which holds ``lengths[bank]`` rows.

        Raises:
            SettingError: There is not one entry a bank, or a row is not there.
        """
        if len(rows) != len(self._masks):
            raise SettingError("rows", len(rows), f"is not one entry for each of {len(self._masks)} banks", "Use None.")
        for bank, numbers in enumerate(rows):
            if (
                numbers is not None
                and len(numbers)
                and not 0 <= int(numbers.min()) <= int(numbers.max()) < lengths[bank]
            ):
                raise SettingError("rows", bank, f"has a row outside 0 to {lengths[bank] - 1}", "Correct it.")
        for bank, numbers in enumerate(rows):
            if numbers is None or not len(numbers):
                continue
            mask = torch.zeros(lengths[bank], dtype=torch.bool, device=numbers.device)
            old = self._masks[bank]
            if old is not None:
                mask[: len(old)] = old.to(mask.device)
            mask[numbers] = True
            self._masks[bank], self._counts[bank] = mask, int(mask.sum())

    def truncate(self, lengths: Sequence[int]) -> None:
        """Bank b has no more than ``lengths[b]`` rows: what comes behind them later was not removed."""
        for bank, (mask, length) in enumerate(zip(self._masks, lengths, strict=True)):
            if mask is not None and len(mask) > length:
                left = mask[:length]
                count = int(left.sum())
                self._masks[bank], self._counts[bank] = left if count else None, count

    def wider(self, k: int, lengths: Sequence[int]) -> int:
        """How many rows to ask for so that k are likely left."""
        share = max(count / max(1, length) for count, length in zip(self._counts, lengths, strict=True))
        return k + 8 + int(_MARGIN * k * share / max(0.05, 1 - share))

    def reset(self, banks: Sequence[int]) -> None:
        """Forgets what was removed from some banks."""
        for bank in banks:
            self._masks[bank], self._counts[bank] = None, 0

    def select(self, banks: Sequence[int]) -> Removed:
        """The same for other banks."""
        twin = Removed(len(banks))
        twin._masks = [self._masks[bank] for bank in banks]
        twin._counts = [self._counts[bank] for bank in banks]
        return twin
