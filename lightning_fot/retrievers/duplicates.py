"""Keys that are nearly the same, indexed once: text that repeats itself would otherwise hide the keys that do not.

A sentence read a thousand times leaves a thousand keys of each token within a hair of each other. The candidates of a
graph search are then all of one kind, and it ends before it meets a key that stands alone: in 32,768 tokens of filler
HNSW found 82 to 94 % of the 32 best, and for some queries none that mattered. Among one key of each kind it finds 97 to
100 %, and its graph is a tenth as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.building import check_job

_SAMPLE = 512
_BLOCK = 1024
_LEAST_SHARE = (
    0.25  # of a sample that have a duplicate, and of all keys that are one: below it, grouping is not worth it
)
_CELLS = 4  # times the root of the number of keys
_KINDS = 8  # groups of k alike that an answer has room for


@dataclass(frozen=True)
class Groups:
    """Which keys are duplicates of which.

    Attributes:
        first: (g,) int64, sorted: the row that stands for its group in the index.
        members: (n,) int64: all rows, group by group, in order.
        starts: (g,) int64: where each group begins in ``members``.
        counts: (g,) int64: its rows.
    """

    first: NDArray[np.int64]
    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.first.nbytes + self.members.nbytes + self.starts.nbytes + self.counts.nbytes

    def rows(self, groups: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Rows of the groups that an index found, at most k of each: more of one kind cannot be among the k best.

        Args:
            groups: (q, k) group numbers, best first; -1 where there is none.
            k: Neighbours wanted.

        Returns:
            (q, k to 8 k) rows without duplicates, those of better groups first; -1 where there are fewer.
        """
        counts = np.where(groups < 0, 0, np.minimum(self.counts.take(groups), k))
        ends = counts.cumsum(axis=1)
        width = max(k, min(_KINDS * k, int(ends[:, -1].max(initial=0))))
        slots = np.arange(width)
        # The group of a slot is the first that ends behind it.
        wanted = torch.from_numpy(np.broadcast_to(slots, (len(groups), width)).copy())
        place = torch.searchsorted(torch.from_numpy(ends), wanted, right=True).numpy()
        beyond = place >= groups.shape[1]
        place[beyond] = 0
        inside = slots - np.take_along_axis(ends - counts, place, axis=1)
        chosen = np.take_along_axis(groups, place, axis=1)
        rows = self.members.take(np.where(beyond, 0, self.starts.take(chosen) + inside))
        rows[beyond] = -1
        return rows


def find_duplicates(vectors: Tensor, distance: float) -> Groups | None:
    """Group vectors that are nearly the same.

    Every vector of a group is as near as asked to the group's first: no two are further apart than twice that.

    Args:
        vectors: (n, dim) float32, as an index gets them.
        distance: Greatest squared distance from a group's first vector; 0 groups nothing.

    Returns:
        None unless a quarter of the vectors repeat others: text that does not repeat itself pays for a sample only.
    """
    if distance <= 0 or len(vectors) < 2 or not _repeats(vectors, distance):
        return None
    group = torch.empty(len(vectors), dtype=torch.int64)
    # Duplicates nearly always share the nearest of a few vectors, so only those that share it are compared.
    pivots = vectors[_spaced(len(vectors), int(_CELLS * len(vectors) ** 0.5))]
    pivots = pivots[torch.unique(_first_alike(pivots, distance))]
    cell = torch.cat([_score(part, pivots).argmax(dim=1) for part in torch.split(vectors, _BLOCK)])
    order = cell.argsort(stable=True)
    for rows in torch.split(order, cell.bincount(minlength=len(pivots)).tolist()):
        check_job()
        if len(rows):
            group[rows] = rows[_first_alike(vectors[rows], distance)]
    first, inverse = torch.unique(group, return_inverse=True)
    if len(first) > (1 - _LEAST_SHARE) * len(vectors):
        return None
    counts = inverse.bincount()
    members = inverse.argsort(stable=True)
    return Groups(first.numpy(), members.numpy(), (counts.cumsum(0) - counts).numpy(), counts.numpy())


def _repeats(vectors: Tensor, distance: float) -> bool:
    picked = _spaced(len(vectors), _SAMPLE)
    sample = vectors[picked]
    best = torch.full((len(sample),), -torch.inf)
    for start in range(0, len(vectors), 16 * _BLOCK):
        scores = _score(sample, vectors[start : start + 16 * _BLOCK])
        own = (picked >= start) & (picked < start + scores.shape[1])
        scores[own.nonzero()[:, 0], picked[own] - start] = -torch.inf
        best = torch.maximum(best, scores.amax(dim=1))
    alike = best >= (sample.square().sum(dim=1) - distance) / 2
    return float(alike.float().mean()) >= _LEAST_SHARE


def _spaced(count: int, wanted: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, wanted)).long()


def _score(some: Tensor, others: Tensor) -> Tensor:
    """(s, o): half of |some|² less the squared distance: the larger, the nearer."""
    return some @ others.T - others.square().sum(dim=1) / 2


def _first_alike(vectors: Tensor, distance: float) -> Tensor:
    """For each vector the place (n,) of the first one as near as asked that stands for itself."""
    enough = (vectors.square().sum(dim=1) - distance) / 2
    group = torch.arange(len(vectors))
    leaders = group[:0]
    for start in range(0, len(vectors), _BLOCK):
        left = group[start : start + _BLOCK].clone()
        if len(leaders):
            left = _join(vectors, enough, group, left, leaders)
        while len(left):
            scores = _score(vectors[left], vectors[left])
            # Whoever has nobody alike before it stands for itself; the others join one, or are asked again.
            alone = ~(scores >= enough[left, None]).tril(-1).any(dim=1)
            new = left[alone]
            leaders = torch.cat((leaders, new))
            left = _join(vectors, enough, group, left[~alone], new)
    return group


def _join(vectors: Tensor, enough: Tensor, group: Tensor, places: Tensor, leaders: Tensor) -> Tensor:
    """Puts places into the group of their nearest leader where it is near enough; returns the others."""
    scores, nearest = _score(vectors[places], vectors[leaders]).max(dim=1)
    alike = scores >= enough[places]
    group[places[alike]] = leaders[nearest[alike]]
    return places[~alike]
