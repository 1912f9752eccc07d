"""What a memory gives to attention: pairs found for each query, or pairs that every query sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Retrieved:
    """Pairs found for each query.

    Args:
        keys: (B, G, R·T, K, D), as if at position 0.
        values: (B, G, R·T, K, D).
        valid: (B, G, R·T, K) bool; False where fewer than K pairs were found.
        rows: (B, G, R·T, K) int64 numbers of the pairs in the memory, -1 where there is none; None if they have none.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """Pairs that every query of a row sees.

    Args:
        keys: (B, G, M, D), as if at position 0.
        values: (B, G, M, D).
        valid: (B, M) bool, or None where all are.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
