"""Keys far from all others, scored exactly beside an index of cells, where text repeats itself.

A cell is found by its centre. In text that repeats itself nearly all keys lie close to theirs; a key that stands alone
(a number told once in filler) is put into the nearest cell all the same, whose centre says nothing of it, so that the
query that looks for it looks elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot.retrievers.index.duplicates import reach, repeats, some_of
from lightning_fot.retrievers.index.jobs import check_job

_PIVOTS = 4  # times the root of the number of keys
_ALIKE = 0.0008  # a key this near another repeats it: share of the largest squared distance from the mean
_REPEATED = 0.1  # share of keys that repeat others; of source code less than .01 do
_FAR = 6.0  # times the mean squared distance to the nearest pivot
_MOST = 32  # one key in so many is set apart at most
_BLOCK = 4096


@dataclass(frozen=True)
class LonelyDetector:
    """Decides which keys are lonely.

    Attributes:
        pivots: (p, dim) some of the keys, as an index has them.
        limit: Squared distance to the nearest of them beyond which a key is lonely.
    """

    pivots: Tensor
    limit: float

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.pivots.numel() * 4

    def find(self, vectors: Tensor) -> Tensor:
        """Positions (h,) int64, sorted, of the lonely among vectors (n, dim): the farthest, at most 64 + n / 32."""
        return _farthest(_distance(vectors, self.pivots), self.limit)


def fit_lonely(vectors: Tensor) -> tuple[LonelyDetector, Tensor] | None:
    """Learn what lonely is in one bank; None where its text does not repeat itself.

    Args:
        vectors: (n, dim) float32, n at least 1, as an index gets them.

    Returns:
        The detector, and what it finds among these: the distances are computed once.
    """
    if not repeats(vectors, reach(vectors, _ALIKE), _REPEATED):
        return None
    pivots = some_of(vectors, int(_PIVOTS * len(vectors) ** 0.5))
    far = _distance(vectors, pivots)
    detector = LonelyDetector(pivots, _FAR * float(far.mean()))
    return detector, _farthest(far, detector.limit)


def _farthest(far: Tensor, limit: float) -> Tensor:
    best = far.topk(min(len(far), 64 + len(far) // _MOST))
    return best.indices[best.values > limit].sort().values


def _distance(vectors: Tensor, pivots: Tensor) -> Tensor:
    """(n,) squared distance to the nearest pivot."""
    nearest, squares = [], pivots.square().sum(dim=1)
    for part in torch.split(vectors, _BLOCK):
        check_job()
        score = torch.addmm(squares, part, pivots.T, alpha=-2).amin(dim=1)
        nearest.append((score + part.square().sum(dim=1)).clamp_min(0))
    return torch.cat(nearest)
