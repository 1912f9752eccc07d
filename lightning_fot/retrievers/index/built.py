"""An index of one bank as a retriever uses it: with its transform and the rows that it is not asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.index.answers import Rows, checked_rows
from lightning_fot.retrievers.index.duplicates import Groups, harmless, repeats, some_of
from lightning_fot.retrievers.index.hubs import HubDetector
from lightning_fot.retrievers.index.isolated import LonelyDetector
from lightning_fot.retrievers.index.jobs import Gate, Job
from lightning_fot.retrievers.index.transforms import FittedTransform
from lightning_fot.retrievers.keys.store import KeyStore

_FIRST_STEP, _LEAST_A_STEP, _MOST_A_STEP = 16, 4, 4096
_STEP_SECONDS = 0.0005  # a search that comes during an extension waits for one step
_TRIED = 1 << 17  # rows that came since the building, on which groups are tried


class Index(Protocol):
    """An index of one bank, as a plug-in writes it: larger inner product is better.

    Rows are numbered in the order of adding. Optional further members: ``nbytes`` (bytes held) and attributes named
    in the retriever's ``query_args`` and ``threads``, which are set before each search where they exist. An index that
    learns from its keys has ``train(keys, count)``, called once before a long bank is added in pieces, with (n, dim)
    of the ``count`` keys to come, evenly spread; without it, it learns from the first piece.

    ``add`` may be called from another thread than ``search``, but never while a search runs.
    """

    def add(self, keys: NDArray[np.float32]) -> None:
        """Append keys (n, dim), contiguous."""

    def search(self, queries: NDArray[np.float32], k: int) -> Any:
        """Rows (q, k) of any integer dtype for queries (q, dim), contiguous; -1 where there are fewer."""


@dataclass(eq=False)
class Built:
    """An index over rows 0..size-1. Nobody begins to extend it while several retrievers own it.

    ``size``, ``apart``, ``apart_keys``, ``groups`` and ``largest`` change together with the index, behind the gate.

    Attributes:
        index: What the backend made.
        transform: Put before it.
        hubs: Finds keys to set apart; None without a transform.
        lonely: Finds more of them; None where cells need not be helped.
        size: Rows it covers.
        trained_at: Rows it was built from.
        apart: (h,) int64, sorted: rows that the index is not asked for, hubs, outliers and the lonely, scored exactly
            in every search.
        apart_keys: (h, D) float32.
        same: Squared distance within which transformed keys count as the same; 0 where that is not asked for.
        groups: Rows but those apart, by kinds of the same, of which the index holds one each; None where it holds every
            row.
        largest: (b, D) float32: the raw keys of the firsts of the largest groups.
        hidden: (n,) bool, n at least ``size``: True for rows in ``apart``. Replaced when rows come, never changed.
        broken: An extension failed half-way: the index cannot be used.
        unfit: Rows have come that its groups do not suit: it answers for those it covers, and is to be built anew.
        owners: Retrievers that answer with it.
        gate: Keeps searches and extensions apart.
    """

    index: Index
    transform: FittedTransform
    hubs: HubDetector | None
    lonely: LonelyDetector | None
    size: int
    trained_at: int
    apart: Tensor
    apart_keys: Tensor
    same: float = 0.0
    groups: Groups | None = None
    largest: Tensor | None = None
    broken: bool = False
    unfit: bool = False
    owners: WeakSet[object] = field(default_factory=WeakSet)
    gate: Gate = field(default_factory=Gate)
    hidden: NDArray[np.bool_] = field(init=False)
    _repeated: int = 0  # rows taken in that repeat each other, though the index has no groups
    _held: int = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = flags_of(self.size, self.apart)
        self._held = len(self.groups.first) if self.groups else self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the index, as far as it tells, and of the keys set apart."""
        groups = self.groups.nbytes if self.groups else 0
        lonely = self.lonely.nbytes if self.lonely else 0
        return (
            int(getattr(self.index, "nbytes", 0)) + self.apart_keys.numel() * 4 + self.hidden.nbytes + groups + lonely
        )

    @property
    def extendable(self) -> bool:
        """Whether new rows can be taken in; where there are too many groups to compare with, they cannot."""
        return self.groups is None or self.groups.vectors is not None

    def ask(self, queries: Tensor, k: int, whole: bool = True) -> tuple[Rows, str | None]:
        """Ask the index, which knows at least k vectors.

        Args:
            queries: (q, D) float32 on the CPU, not transformed.
            k: Neighbours wanted.
            whole: Look at each number too; otherwise the caller does.

        Returns:
            Row numbers (q, k), or numbers of groups where there are, -1 where there are fewer; and why they cannot be
            used, None when they can.
        """
        found = self.index.search(self.transform.queries(queries), k)
        rows, problem = checked_rows(found, len(queries), k, self._held, whole)
        if problem is None and self.groups is not None and self._held > len(self.groups.first):
            rows[rows >= len(self.groups.first)] = -1  # an extension is at work
        return rows, problem

    def still_fits(self, length: int) -> bool:
        """Whether what was learned at training (cells, mean, radius, groups) suits a bank of ``length`` keys."""
        # More than is set apart at a time: 64 and one in 32 that are lonely, one in 64 that are hubs, few outliers.
        few_apart, few_repeated = len(self.apart) <= 128 + self.size // 16, 3 * self._repeated <= self.size
        return length < 2 * self.trained_at and few_apart and few_repeated and not self.unfit

    def extend(self, store: KeyStore, bank: int, length: int, job: Job[Any]) -> None:
        """Takes in the rows up to ``length``, a few at a time: searches wait for a few only.

        Where its groups do not suit them it takes in none, and is unfit from now on.

        Raises:
            StoppedError: The job is not wanted any more; what was taken in until then counts, but for groups.
            Exception: What the index raised; it cannot be used any more.
        """
        done = self.size
        keys = store.rows(bank, done, length).cpu()
        moved, apart = prepare(keys, self.transform, self.hubs, self.lonely)
        apart_keys = keys[apart].float()
        flags = flags_of(length - done, apart)
        # From ``done`` on anew: an extension that ended early may have left flags there.
        self.hidden = np.concatenate((self.hidden[:done], flags))

        def take(start: int, end: int) -> None:
            inside = (apart >= start) & (apart < end)
            if bool(inside.any()):
                self.apart = torch.cat((self.apart, apart[inside] + done))
                self.apart_keys = torch.cat((self.apart_keys, apart_keys[inside]))
            self.size = done + end

        if self.groups is None:
            again = bool(self.same) and repeats(moved, self.same)
            for start, end in self._added(moved, job):
                take(start, end)
                self._repeated += again * (end - start)
            return
        others = np.flatnonzero(~flags)
        groups, new = self.groups.extended(others + done, moved[torch.from_numpy(others)])
        if not self._suits(groups, store, bank):
            self.unfit = True
            return
        largest = store.take(bank, torch.from_numpy(groups.first[groups.largest])).cpu().float()
        try:
            for _ in self._added(new, job):
                pass
        except BaseException:
            self.broken = True  # it holds vectors of no group
            raise
        with self.gate:
            self.groups, self.largest = groups, largest
            take(0, length - done)

    def _suits(self, groups: Groups, store: KeyStore, bank: int) -> bool:
        """Whether groups find what there is among the rows that came since the building.

        How near is nearly the same was learned from others: of a smaller scale, keys that differ would be one kind.
        """
        assert groups.vectors is not None
        rows, group = groups.of_rows()
        new = int(np.searchsorted(rows, self.trained_at))
        tried = some_of(torch.arange(new, len(rows)), _TRIED)
        if not len(tried):
            return True
        vectors, _ = self.transform.keys(store.take(bank, torch.from_numpy(rows)[tried]).cpu())
        kinds, of_kind = torch.unique(torch.from_numpy(group)[tried], return_inverse=True)
        nothing = vectors.new_zeros(0, vectors.shape[1])
        return harmless(groups.vectors[kinds], of_kind, vectors, nothing, len(self.transform.mean))

    def _added(self, vectors: Tensor, job: Job[Any]) -> Iterator[tuple[int, int]]:
        """Adds vectors to the index, some at a time; yields which, behind the gate."""
        done, step, given = 0, _FIRST_STEP, vectors.numpy()
        while done < len(given):
            job.check()
            end = min(len(given), done + step)
            with self.gate:
                began = perf_counter()
                try:
                    self.index.add(given[done:end])
                except BaseException:
                    self.broken = True
                    raise
                self._held += end - done
                yield done, end
                share = _STEP_SECONDS / max(1e-6, perf_counter() - began)
            step, done = int(min(_MOST_A_STEP, max(_LEAST_A_STEP, step * min(4.0, share)))), end


def flags_of(size: int, rows: Tensor) -> NDArray[np.bool_]:
    """(size,) bool, True at ``rows``."""
    flags = np.zeros(size, dtype=np.bool_)
    flags[rows.numpy()] = True
    return flags


def prepare(
    keys: Tensor, transform: FittedTransform, hubs: HubDetector | None, lonely: LonelyDetector | None = None
) -> tuple[Tensor, Tensor]:
    """Transformed keys (n, dim) and the sorted positions of those set apart.

    The index sees the mean key in the place of a hub.
    """
    hidden = keys.float()
    found = hubs.find(keys) if hubs is not None else torch.zeros(0, dtype=torch.int64)
    if len(found):
        hidden = hidden.clone()
        hidden[found] = transform.centre
    moved, outliers = transform.keys(hidden)
    apart = torch.cat((found, outliers)).sort().values
    return moved, apart if lonely is None else union(apart, lonely.find(moved))


def union(some: Tensor, others: Tensor) -> Tensor:
    """Sorted rows that are in one or the other."""
    together: Tensor = torch.unique(torch.cat((some, others)))
    return together
