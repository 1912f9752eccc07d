"""Keys that are nearly the same, indexed once: text that repeats itself would otherwise hide the keys that do not.

A sentence read a thousand times leaves a thousand keys of each token within a hair of each other. The candidates of a
graph search are then all of one kind, and it ends before it meets a key that stands alone: in 32,768 tokens of filler
HNSW found 82 to 94 % of the 32 best, and for some queries none that mattered. Among one key of each kind it finds 97 to
100 %, and its graph is a third to a tenth as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.index.jobs import check_job

_SAMPLE = 512
_BLOCK = 1024
_MOST_KINDS = 2 / 3  # of the keys: with more of them, groups are not worth their cost
_PIVOTS = 4  # times the root of the number of keys
_LARGEST_CELL = 1 << 14
_EXTENDABLE = 1 << 14  # groups: new keys are compared with all of them
_SPREAD_SAMPLE = 1 << 16
_SPREAD_QUANTILE = 0.999
_BESIDE = 64  # groups
_ASKED, _WANTED = 64, 32  # queries that groups are tried with, of each sort, and neighbours of each
_MOST_LOST = 0.005  # recall


@dataclass(frozen=True)
class Groups:
    """Which rows are duplicates of which.

    Attributes:
        first: (g,) int64, sorted: the row that stands for its group in the index.
        members: (n,) int64: all rows, group by group, in order.
        counts: (g,) int64: rows of each group.
        distance: Greatest squared distance from a group's first.
        vectors: (g, dim) float32: the firsts as the index has them; None where there are too many to compare with.
    """

    first: NDArray[np.int64]
    members: NDArray[np.int64]
    counts: NDArray[np.int64]
    distance: float
    vectors: Tensor | None

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self.counts.cumsum() - self.counts

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        vectors = 0 if self.vectors is None else self.vectors.numel() * 4
        return self.first.nbytes + self.members.nbytes + 2 * self.counts.nbytes + vectors

    def reaching(self, groups: NDArray[np.int64], scores: NDArray[np.float32], slack: Any, k: int) -> NDArray[np.int64]:
        """The groups of which a row may be among the k best.

        Args:
            groups: (q, m) group numbers, m at least 1, best first; -1 where there is none.
            scores: (q, m) of their firsts, not ascending.
            slack: (q, 1) how far the score of a row may lie from that of its group's first.
            k: Neighbours wanted.

        Returns:
            ``groups``, -1 for those of which each row scores less than k rows do.
        """
        counts = np.where(groups < 0, 0, self.counts.take(groups))
        enough = counts.cumsum(axis=1) >= k
        # The last that is needed for k rows; all, where there are not as many.
        last = np.where(enough.any(axis=1), enough.argmax(axis=1), groups.shape[1] - 1)[:, None]
        least = np.take_along_axis(scores, last, axis=1) - slack
        return np.where(scores + slack >= least, groups, -1)

    def rows(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """All rows of the groups that were found.

        Args:
            groups: (q, m) group numbers, m at least 1; -1 where there is none.

        Returns:
            (q, w) rows without duplicates, those of groups that come first first; -1 where there are fewer.
        """
        counts = np.where(groups < 0, 0, self.counts.take(groups))
        ends = counts.cumsum(axis=1)
        slots = np.arange(int(ends[:, -1].max(initial=0)))
        # The group of a slot is the first that ends behind it.
        wanted = torch.from_numpy(np.broadcast_to(slots, (len(groups), len(slots))).copy())
        place = torch.searchsorted(torch.from_numpy(ends), wanted, right=True).numpy()
        beyond = place >= groups.shape[1]
        place[beyond] = 0
        chosen = np.take_along_axis(groups, place, axis=1)
        inside = slots - np.take_along_axis(ends - counts, place, axis=1)
        rows = self.members.take(np.where(beyond, 0, self._starts.take(chosen) + inside))
        rows[beyond] = -1
        return rows

    @cached_property
    def largest(self) -> NDArray[np.int64]:
        """Numbers of the groups with the most rows, sorted, at most 64: of one row is none of them.

        They are scored beside the index: a few vectors far from all others are hard to reach in a graph, however many
        rows they stand for.
        """
        most = self.counts.argsort(kind="stable")[-_BESIDE:]
        return np.sort(most[self.counts[most] > 1])

    def of_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All rows (n,), sorted, and the number of the group of each (n,)."""
        order = self.members.argsort()
        return self.members[order], np.repeat(np.arange(len(self.first)), self.counts)[order]

    def extended(self, rows: NDArray[np.int64], vectors: Tensor) -> tuple[Groups, Tensor]:
        """The groups with more rows: each joins the group of the nearest first, or begins one.

        Args:
            rows: (m,) int64, larger than those before.
            vectors: (m, dim) float32.

        Returns:
            The new groups, and the vectors (h, dim) of those that were added, in order.
        """
        assert self.vectors is not None
        known = len(self.first)
        every = torch.cat((self.vectors, vectors))
        group = _first_alike(every, self.distance, known)[known:]
        first = torch.unique(group[group >= known])
        number = torch.where(group < known, group, known + torch.searchsorted(first, group))
        of_member = np.concatenate((np.repeat(np.arange(known), self.counts), number.numpy()))
        new = every[first]
        members = np.concatenate((self.members, rows))
        firsts = np.concatenate((self.first, rows[(first - known).numpy()]))
        return _groups(firsts, members, of_member, self.distance, torch.cat((self.vectors, new))), new


def reach(vectors: Tensor, share: float) -> float:
    """Squared distance within which vectors (n, dim), n at least 1, count as the same.

    Args:
        vectors: As an index gets them.
        share: Of the largest squared distance from the mean. That is the 0.999 quantile: a few outliers do not count,
            nor that most vectors are of one kind.

    Returns:
        At least what rounding makes of equal vectors; 0 for a share of 0.
    """
    if share <= 0:
        return 0.0
    some = some_of(vectors, _SPREAD_SAMPLE)
    squares = (some - some.mean(dim=0)).square().sum(dim=1)
    spread = float(squares.kthvalue(max(1, int(_SPREAD_QUANTILE * len(squares)))).values)
    return max(share * spread, 1e-7 * float(vectors[0].square().sum()))


def find_duplicates(vectors: Tensor, distance: float, rows: NDArray[np.int64] | None = None) -> Groups | None:
    """Group vectors that are nearly the same.

    Every vector of a group is as near as asked to the group's first: no two are further apart than twice that.

    Args:
        vectors: (n, dim) float32, as an index gets them.
        distance: Greatest squared distance from a group's first; 0 groups nothing.
        rows: (n,) int64, sorted: their row numbers; None counts from 0.

    Returns:
        None unless a third of the vectors repeat others: text that does not repeat itself pays for a sample only.
    """
    if distance <= 0 or len(vectors) < 2 or not repeats(vectors, distance):
        return None
    group = torch.empty(len(vectors), dtype=torch.int64)
    # Duplicates nearly always share the nearest of a few vectors, so only those that share it are compared.
    pivots = some_of(vectors, int(_PIVOTS * len(vectors) ** 0.5))
    pivots = pivots[torch.unique(_first_alike(pivots, distance))]
    cell = torch.cat([_nearest(part, pivots) for part in torch.split(vectors, _BLOCK)])
    order = cell.argsort(stable=True)
    for places in torch.split(order, cell.bincount(minlength=len(pivots)).tolist()):
        for part in torch.split(places, _LARGEST_CELL):
            if len(part):
                group[part] = part[_first_alike(vectors[part], distance)]
    first, of_member = torch.unique(group, return_inverse=True)
    if len(first) > _MOST_KINDS * len(vectors):
        return None
    numbers = np.arange(len(vectors)) if rows is None else rows
    return _groups(numbers[first.numpy()], numbers, of_member.numpy(), distance, vectors[first])


def harmless(firsts: Tensor, group: Tensor, vectors: Tensor, queries: Tensor, real: int) -> bool:
    """Whether neighbours are found by groups as they are without: asked, not assumed.

    How near is nearly the same cannot be told from distances alone: a few keys far out make near neighbours of all the
    others look alike, and kinds of one text may lie as close as the keys of another.

    Args:
        firsts: (g, dim) the vectors that stand for groups, as the index has them.
        group: (n,) int64, which of them stands for each vector.
        vectors: (n, dim) as an index gets them.
        queries: (m, dim) past queries, as the index gets them; few or none are known.
        real: Coordinates that queries have; the others are zero.
    """
    k = min(_WANTED, max(1, len(vectors) // 8))
    some = some_of(vectors, _ASKED)
    around = some - vectors.mean(dim=0)
    spread = some_of(vectors, _SPREAD_SAMPLE).std(dim=0, correction=0)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(_ASKED, vectors.shape[1], generator=generator, dtype=torch.float32)
    sorts = [around, random, random * spread, some_of(queries, _ASKED)]
    for asked in sorts:
        asked = torch.nn.functional.pad(asked[:, :real], (0, vectors.shape[1] - real))
        lost = []
        for part in torch.split(asked, 16):
            check_job()
            scores = part @ vectors.T
            best = (part @ firsts.T).topk(min(k, len(firsts)), dim=1).indices
            found = torch.zeros(len(part), len(firsts), dtype=torch.bool).scatter_(1, best, True)
            want = scores.topk(k, dim=1)
            # Rows that score as the last that is wanted are as good as it.
            seen = scores.masked_fill(~found[:, group], -torch.inf).topk(k, dim=1).values
            least = want.values[:, -1:] - 1e-5 * scores.abs().amax(dim=1, keepdim=True)
            lost.append(1 - (seen >= least).float().mean(dim=1))
        if lost and float(torch.cat(lost).mean()) > _MOST_LOST:
            return False
    return True


def repeats(vectors: Tensor, distance: float, share: float = 1 - _MOST_KINDS) -> bool:
    """Whether such a share of a sample of vectors (n, dim) has another one within a squared distance.

    By default as many as make groups pay.
    """
    picked = _some(len(vectors), _SAMPLE)
    sample = vectors[picked]
    best = torch.full((len(sample),), -torch.inf, dtype=torch.float32)
    for start in range(0, len(vectors), 16 * _BLOCK):
        check_job()
        scores = _score(sample, vectors[start : start + 16 * _BLOCK])
        own = (picked >= start) & (picked < start + scores.shape[1])
        scores[own.nonzero()[:, 0], picked[own] - start] = -torch.inf
        best = torch.maximum(best, scores.amax(dim=1))
    alike = best >= (sample.square().sum(dim=1) - distance) / 2
    return float(alike.float().mean()) >= share


def some_of(vectors: Tensor, wanted: int) -> Tensor:
    """Of vectors (n, dim) at most so many, drawn anew the same way each time."""
    return vectors[_some(len(vectors), wanted)]


def _groups(
    first: NDArray[np.int64],
    members: NDArray[np.int64],
    of_member: NDArray[np.int64],
    distance: float,
    vectors: Tensor,
) -> Groups:
    order = of_member.argsort(kind="stable")
    kept = vectors if len(vectors) <= _EXTENDABLE else None
    return Groups(first, members[order], np.bincount(of_member, minlength=len(first)), distance, kept)


def _some(count: int, wanted: int) -> Tensor:
    """Places (min(count, wanted),) int64, sorted, drawn anew the same way each time."""
    if wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].sort().values


def _score(some: Tensor, others: Tensor) -> Tensor:
    """(s, o): half of |some|² less the squared distance: the larger, the nearer."""
    return some @ others.T - others.square().sum(dim=1) / 2


def _nearest(some: Tensor, others: Tensor) -> Tensor:
    check_job()
    return _score(some, others).argmax(dim=1)


def _first_alike(vectors: Tensor, distance: float, known: int = 0) -> Tensor:
    """For each vector the place (n,) of one as near as asked that stands for itself; the first ``known`` all do."""
    enough = (vectors.square().sum(dim=1) - distance) / 2
    group = torch.arange(len(vectors))
    leaders = group[:known]
    for start in range(known, len(vectors), _BLOCK):
        check_job()
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
