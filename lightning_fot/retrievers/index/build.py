"""Makes the index of one bank from its keys, all at once or in pieces, and the job that does it beside the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_fot.config.retriever import TransformSpec
from lightning_fot.retrievers.index.built import Built, Index, flags_of, prepare, union
from lightning_fot.retrievers.index.duplicates import Groups, find_duplicates, harmless, reach
from lightning_fot.retrievers.index.hubs import HubDetector, fit_hubs
from lightning_fot.retrievers.index.isolated import LonelyDetector, fit_lonely
from lightning_fot.retrievers.index.jobs import Job, check_job
from lightning_fot.retrievers.index.transforms import FittedTransform, fit_transform
from lightning_fot.retrievers.keys.store import KeyStore

_PIECE = 1 << 16  # rows added at once to a new index of a long bank
_NEARER = np.array([1.0, 1 / 16, 1 / 256])  # parts of the distance that are tried, one after the other
AT_ONCE = 1 << 21  # rows of a bank that are in memory as float32 at a time: 512 MiB of 64 coordinates


@dataclass(frozen=True)
class Recipe:
    """How an index is built.

    Args:
        new_index: Makes an empty index of so many coordinates.
        transform: Maps to put before the index.
        duplicate_distance: As a retriever's.
        smallest: Vectors that the index needs at least: fewer groups are not indexed as such.
        pieces: Whether the index may get its rows in pieces: whether it can be extended.
        cells: Set lonely keys apart.
    """

    new_index: Callable[[int], Index]
    transform: TransformSpec
    duplicate_distance: float = 0.0
    smallest: int = 1
    pieces: bool = False
    cells: bool = False


def build(recipe: Recipe, store: KeyStore, bank: int, length: int, past: Tensor) -> Built:
    """An index over the first ``length`` rows of a bank.

    Of a longer bank than ``AT_ONCE`` rows the transform and the hubs are learned from so many, evenly spread,
    and the index gets its rows in pieces; not where duplicates are sought, which takes all rows.

    Args:
        recipe: What is built.
        store: Where the keys are.
        bank: Which of its banks.
        length: Rows to cover.
        past: (m, D) past queries of the bank, to learn from.
    """
    if recipe.pieces and length > AT_ONCE and not recipe.duplicate_distance:
        return _build_in_pieces(recipe, AT_ONCE, store, bank, length, past)
    keys = store.rows(bank, 0, length).cpu()
    transform, hubs, lonely, moved, apart = _learn(recipe, keys, past)
    others = torch.from_numpy(np.flatnonzero(~flags_of(length, apart)))
    same, groups = _group(recipe, moved, others, transform, past)
    index = recipe.new_index(transform.dim)
    index.add(moved.numpy() if groups is None else moved.numpy()[groups.first])
    largest = None if groups is None else keys[torch.from_numpy(groups.first[groups.largest])].float()
    return Built(index, transform, hubs, lonely, length, length, apart, keys[apart].float(), same, groups, largest)


def _group(
    recipe: Recipe, moved: Tensor, others: Tensor, transform: FittedTransform, past: Tensor
) -> tuple[float, Groups | None]:
    """Groups of rows that may be indexed once, and the squared distance within which they count as the same.

    Where keys are lost by it, only what is nearer still counts: text that repeats itself word by word does.
    """
    for share in recipe.duplicate_distance * _NEARER:
        same = reach(moved, float(share))
        groups = find_duplicates(moved[others], same, others.numpy()) if same else None
        if groups is None or len(groups.first) < recipe.smallest:
            return same, None
        asked = torch.from_numpy(transform.queries(past.cpu().clone()))
        _, group = groups.of_rows()
        firsts = moved[torch.from_numpy(groups.first)]
        if harmless(firsts, torch.from_numpy(group), moved[others], asked, len(transform.mean)):
            return same, groups
    return 0.0, None


def _build_in_pieces(recipe: Recipe, at_once: int, store: KeyStore, bank: int, length: int, past: Tensor) -> Built:
    learned = store.take(bank, torch.linspace(0, length - 1, at_once, dtype=torch.float64).long()).cpu()
    transform, hubs, lonely, learned, _ = _learn(recipe, learned, past, at_once / length)
    index = recipe.new_index(transform.dim)
    train = getattr(index, "train", None)
    if train is not None:
        train(learned.numpy(), length)
    del learned
    found = []
    # Smaller pieces than what was learned from: the transform makes several copies on the way, the index one more.
    for first, keys in store.blocks(bank, 0, length, min(at_once, _PIECE)):
        check_job()
        keys = keys.cpu()
        moved, apart = prepare(keys, transform, hubs, lonely)
        index.add(moved.numpy())
        found.append((apart + first, keys[apart].float()))
    apart, apart_keys = (torch.cat(part) for part in zip(*found, strict=True))
    return Built(index, transform, hubs, lonely, length, length, apart, apart_keys)


def _learn(
    recipe: Recipe, keys: Tensor, past: Tensor, share: float = 1.0
) -> tuple[FittedTransform, HubDetector | None, LonelyDetector | None, Tensor, Tensor]:
    """What a bank's keys (n, D), such a share of all, teach; then they are prepared by it."""
    transform = fit_transform(keys, past, recipe.transform)
    hubs = fit_hubs(keys, past, share) if recipe.transform != TransformSpec() else None
    moved, apart = prepare(keys, transform, hubs)
    lonely = fit_lonely(moved) if recipe.cells else None
    if lonely is None:
        return transform, hubs, None, moved, apart
    return transform, hubs, lonely[0], moved, union(apart, lonely[1])


class Owner(Protocol):
    """What a build is for: a retriever. Its forks have the same recipe."""

    def build_recipe(self) -> Recipe:
        """How its indexes are built."""
        ...


class BuildJob(Job[Owner]):
    """Builds the index of one bank, or extends one, from a snapshot of its keys.

    Args:
        store: The snapshot.
        bank: Which of its banks.
        length: Rows that the index is to cover.
        past: (m, D) past queries, the job's own.
        extends: The index to extend; None builds one.

    Attributes:
        length: As given.
        extends: As given.
        built: What was built.
        counted: Whether some retriever's counters hold it.
    """

    def __init__(self, store: KeyStore, bank: int, length: int, past: Tensor, extends: Built | None) -> None:
        super().__init__(partial(_work, store, bank, past))
        self.length = length
        self.extends = extends
        self.built: Built | None = None
        self.counted = False

    def abandon(self) -> None:
        """As :meth:`Job.abandon`; an index that was being extended is torn."""
        if self.begun and self.extends is not None:
            self.extends.broken = True
        super().abandon()


def _work(store: KeyStore, bank: int, past: Tensor, job: BuildJob) -> None:
    if job.extends is not None:
        while job.extends.size < job.length and not job.extends.unfit:
            job.extends.extend(store, bank, min(job.length, job.extends.size + AT_ONCE), job)
        return
    job.built = build(job.waiting().build_recipe(), store, bank, job.length, past)
