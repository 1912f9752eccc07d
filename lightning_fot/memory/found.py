"""What a memory gives to attention: pairs found for each query, pairs that every query sees, or attention to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How a layer scores pairs, for memories that attend where their pairs lie.

    Args:
        scale: Factor on inner products.
        softcap: ``c`` of ``c · tanh(score / c)``, or None.
        weights: Whether the weight of each pair is wanted.
        pairs: Whether the pairs themselves are: for gradients, or dropout of single ones.
    """

    scale: float
    softcap: float | None = None
    weights: bool = False
    pairs: bool = False


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

    @property
    def columns(self) -> int:
        """Scores of a query."""
        return self.keys.shape[-2]


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

    rows = None

    @property
    def columns(self) -> int:
        """Scores of a query."""
        return self.keys.shape[-2]


@dataclass(frozen=True)
class Attended:
    """Attention to a memory's pairs, computed where they lie.

    One softmax over local pairs and these is that over local pairs and one more, of score ``lse`` and value ``out``.

    Args:
        out: (B, G, R·T, D), the values' mean by the softmax over the pairs alone; 0 where there are none.
        lse: (B, G, R·T), the log-sum-exp of their scores, fp32; -inf where there are none.
        rows: (B, G, R·T, K) int64 numbers of the pairs, -1 where there is none; None where no weights are wanted.
        scores: (B, G, R·T, K), their scores, -inf where there is none; None as ``rows``.
    """

    out: Tensor
    lse: Tensor
    rows: Tensor | None = None
    scores: Tensor | None = None

    columns = 1


Found = Retrieved | Shown | Attended
