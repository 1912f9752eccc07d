"""One index a bank: what third parties implement, with everything around it done here."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from time import perf_counter
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lightning_fot.config.retriever import TransformSpec
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.index.answers import Rows, merged_few
from lightning_fot.retrievers.index.build import BuildJob, Recipe
from lightning_fot.retrievers.index.built import Built
from lightning_fot.retrievers.index.built import Index as Index
from lightning_fot.retrievers.index.duplicates import Groups
from lightning_fot.retrievers.index.jobs import StoppedError, in_background, submit
from lightning_fot.retrievers.index.reservoir import QueryReservoir
from lightning_fot.retrievers.index.transforms import FittedTransform
from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.checks import checked_banks
from lightning_fot.retrievers.keys.scan import best_of, pad_rows, rescore, stacked, topk_blocks
from lightning_fot.retrievers.keys.store import KeyStore
from lightning_fot.system.lasting import lasting

_MIN_TAIL = 2048
_SHARE_TO_EXTEND = 0.05
_SHARE_TO_REBUILD = 0.5
_SMALL_BATCH = 16
# Who answers with an index, or waits for one: sets that retrievers of several threads share.
_OWNERSHIP = RLock()


class PerBankRetriever(Retriever):
    """Keeps one index for each bank and makes up for what the index lacks.

    Indexes are built and extended in the background (``build``), from a snapshot of the keys; :meth:`flush` waits for
    them. Keys that no index covers yet are scanned exactly and merged; candidates are rescored against the raw keys;
    row numbers are checked; an index that fails is replaced by exact search, counted and warned of once. A subclass
    implements :meth:`new_index` and names in ``query_args`` what can change without a rebuild.

    Class attributes for subclasses: ``incremental`` (whether ``Index.add`` may be called again after a search),
    ``smallest_index`` (keys an index needs at least), ``default_transform``, ``default_duplicate_distance`` (0 for
    indexes that lose nothing among duplicates, as cells), ``cells`` (the index looks into few of many cells: where
    text repeats itself, keys that stand alone are scored beside it). The default transform ends in L2 augmentation: its
    keys have one norm, so an inner-product index and an L2 index both rank rightly.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        **kwargs: Those of :class:`Retriever`.
    """

    incremental: ClassVar[bool] = True
    smallest_index: ClassVar[int] = 1
    default_transform: ClassVar[TransformSpec] = TransformSpec(center=True, query_power=0.25, l2_augment=True)
    default_duplicate_distance: ClassVar[float] = 0.0008
    cells: ClassVar[bool] = False

    def __init__(self, dim: int, banks: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, banks, **kwargs)
        self._built: list[Built | None] = [None] * banks
        self._jobs: list[BuildJob | None] = [None] * banks
        self._failed_at = [0] * banks
        # Of what was last merged in each bank; replaced, never changed.
        self._apart: list[native.Apart | None] = [None] * banks
        self._reservoir = QueryReservoir(dim, banks, self.seed)
        self._warned = False

    @abstractmethod
    def new_index(self, dim: int) -> Index:
        """An empty index for vectors of ``dim`` coordinates (after the transform, not the head size)."""

    def threads_for(self, queries: int) -> int:
        """Threads worth using for a call: small batches are slower with several, and a caller is left one beside."""
        if queries <= _SMALL_BATCH:
            return 1
        return self.num_threads or max(1, torch.get_num_threads() - in_background())

    @property
    def indexed(self) -> Tensor:
        """Keys of each bank that an index covers, (banks,) int64; the others are scanned."""
        return torch.tensor([built.size if built else 0 for built in self._built], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the indexes and of the sampled queries, and of the keys unless they belong to a memory."""
        indexes = sum(built.nbytes for built in self._built if built)
        return super().nbytes + indexes + self._reservoir.nbytes

    @lasting
    def observe(self, queries: Tensor) -> None:
        """Show past queries (banks, q, dim), rotated as they are searched with: for the query-aware map and for hubs.

        A sample is kept; the next index that is built learns from it. ``search`` changes nothing.

        Raises:
            SettingError: Shapes do not fit or a query is not finite.
        """
        checked = self._checked_queries(queries)
        if self.transform != TransformSpec() and checked.shape[1]:
            self._reservoir.observe(checked)

    @lasting
    @torch.no_grad()
    def flush(self) -> None:
        """Build now whatever is pending: afterwards each bank of at least ``min_index_size`` keys has no tail.

        Raises:
            MissingLibraryError: The library behind the index is not installed.
        """
        began = perf_counter()
        for bank, job in enumerate(self._jobs):
            if job is not None:
                job.finish()
                with self._lock:
                    self._collect(bank)
        self._stats.wait_seconds += perf_counter() - began
        self._refresh(flush=True)

    def reset(self, banks: Sequence[int] | None = None) -> None:
        """Forget keys, indexes and observed queries of some banks, or of all.

        Args:
            banks: Bank numbers; None means all.

        Raises:
            SettingError: A bank number is out of range.
        """
        numbers = checked_banks(banks, self.banks)
        with self._lock:
            super().reset(banks)
            for bank in numbers:
                self._drop(bank)
                self._failed_at[bank] = 0
            self._reservoir.reset(numbers)

    def fork(self, store: KeyStore | None = None) -> Self:
        """A snapshot in O(1): built indexes are shared and read only until one side is gone.

        Args:
            store: The fork of the key buffer to search; None forks this retriever's own.
        """
        twin = super().fork(store)
        twin._share(self, range(self.banks))
        twin._reservoir = self._reservoir.fork()
        return twin

    def select(self, banks: Sequence[int], store: KeyStore) -> Self | None:
        """A snapshot whose bank i is bank ``banks[i]`` of this retriever, sharing its indexes.

        Args:
            banks: Bank numbers, repeated ones too.
            store: The keys of those banks.
        """
        twin = super().select(banks, store)
        if twin is not None:
            for bank in range(self.banks):
                twin._drop(bank)
            twin._share(self, banks)
            twin._reservoir = self._reservoir.select(banks)
        return twin

    def _share(self, other: PerBankRetriever, banks: Sequence[int]) -> None:
        """Takes over what ``other`` has built, and is building, of some banks."""
        # Within the other's lock: it must not find itself alone with an index, and extend it, before this one counts.
        with other._lock, _OWNERSHIP:
            self._built = [other._built[bank] for bank in banks]
            self._jobs = [other._jobs[bank] for bank in banks]
            self._failed_at = [other._failed_at[bank] for bank in banks]
            self._apart = [other._apart[bank] for bank in banks]
            for built in self._built:
                if built is not None:
                    built.owners.add(self)
            for job in self._jobs:
                if job is not None:
                    job.wanted_by.add(self)

    def renumber(self) -> None:
        """Drop all indexes, after the owner of the store numbered its rows anew; observed queries stay."""
        with self._lock:
            for bank in range(self.banks):
                self._drop(bank)
                self._failed_at[bank] = 0
            super().renumber()

    def _truncated(self, lengths: Sequence[int]) -> None:
        with self._lock:
            super()._truncated(lengths)
            for bank, length in enumerate(lengths):
                built, job = self._built[bank], self._jobs[bank]
                if (built is not None and built.size > length) or (job is not None and job.length > length):
                    self._drop(bank)

    def _drop(self, bank: int) -> None:
        """Forgets what is built, and is being built, of a bank."""
        with self._lock, _OWNERSHIP:
            built, job = self._built[bank], self._jobs[bank]
            self._built[bank] = self._jobs[bank] = None
            self._disown(built)
            if job is not None and not any(other is job for other in self._jobs):
                job.release(self)
                self._disown(job.built)

    def _disown(self, built: Built | None) -> None:
        """Stops answering with an index, unless another bank does."""
        if built is not None and not any(other is built for other in self._built):
            built.owners.discard(self)

    def _refresh(self, flush: bool = False) -> None:
        """Take finished work into use; have the indexes built or extended whose exact tail has grown too long."""
        with self._lock:
            for bank, length in enumerate(self._store.lengths_list):
                self._collect(bank)
                self._look_after(bank, length, flush)

    def _look_after(self, bank: int, length: int, flush: bool) -> None:
        built = self._built[bank]
        if self._jobs[bank] is not None or length < max(self.min_index_size, self.smallest_index):
            return
        if length < 2 * self._failed_at[bank]:
            return
        if built is None:
            self._begin(bank, length, None, flush)
            return
        tail = length - built.size
        if tail <= 0:
            return
        in_place = self.incremental and built.extendable and not self._shares(built)
        share = _SHARE_TO_EXTEND if in_place else _SHARE_TO_REBUILD
        if flush or tail > max(self._min_tail, share * built.size):
            self._begin(bank, length, built if in_place and built.still_fits(length) else None, flush)

    @property
    def _min_tail(self) -> int:
        return min(_MIN_TAIL, max(1, self.min_index_size // 8))

    def _shares(self, built: Built) -> bool:
        """Whether another retriever, or another bank of this one, answers with this index or is about to."""
        waiting = sum(job is not None and job.built is built for job in self._jobs)
        with _OWNERSHIP:
            owners = len(built.owners)
        return owners > 1 or waiting + sum(other is built for other in self._built) > 1

    def build_recipe(self) -> Recipe:
        """How the index of a bank is built."""
        return Recipe(
            self.new_index, self.transform, self.duplicate_distance, self.smallest_index, self.incremental, self.cells
        )

    def _begin(self, bank: int, length: int, extends: Built | None, wait: bool) -> None:
        """Start to build the index of a bank, or to extend it."""
        wait = wait or self.build == "blocking"
        past = self._reservoir.bank(bank)
        store = self._store
        if not wait:
            # The caller goes on to observe and to add.
            past, store = past[:0] if extends is not None else past.clone(), store.select([bank])
        job = BuildJob(store, bank if wait else 0, length, past, extends)
        with _OWNERSHIP:
            job.wanted_by.add(self)
        self._jobs[bank] = job
        if not wait:
            submit(job)
            return
        try:
            job.run()
        finally:
            self._stats.wait_seconds += job.seconds
            self._collect(bank)
        if extends is not None and extends.unfit:
            self._begin(bank, length, None, wait)

    def _collect(self, bank: int) -> None:
        """Take into use what was built of a bank; drop what does not fit the keys any more."""
        built, job, length = self._built[bank], self._jobs[bank], self._store.lengths_list[bank]
        if (built is not None and built.size > length) or (job is not None and job.length > length):
            # The owner of the store took keys back without telling.
            self._drop(bank)
            return
        if job is not None and job.done:
            self._jobs[bank] = None
            self._take(bank, job)
            if not any(other is job for other in self._jobs):
                with _OWNERSHIP:
                    job.release(self)
        elif built is not None and built.broken:
            self._drop(bank)

    def _take(self, bank: int, job: BuildJob) -> None:
        counted, job.counted = job.counted, True
        if job.extends is not None and job.extends.broken:
            self._drop(bank)
        error = job.error
        if error is None:
            if not counted:
                self._stats.built(job.seconds, anew=job.extends is None)
            if job.built is not None:
                self._drop(bank)
                # Forks that have yet to take it too: what is added to this one must not get into theirs.
                with _OWNERSHIP:
                    job.built.owners.update((self, *job.wanted_by))
                self._built[bank] = job.built
        elif isinstance(error, (MissingLibraryError, SettingError)):
            raise error
        elif not isinstance(error, (StoppedError, KeyboardInterrupt)):
            self._drop(bank)
            # Not tried again before the bank has doubled.
            self._failed_at[bank] = job.length
            self._fell_back(f"building the index failed: {type(error).__name__}: {error}")

    def _search(self, queries: Tensor, k: int) -> Tensor:
        self._refresh()
        return stacked([pad_rows(self._search_bank(bank, queries[bank], k), k) for bank in range(self.banks)])

    def _search_bank(self, bank: int, queries: Tensor, k: int) -> Tensor:
        """Rows (q, at most k) of one bank: index, exact tail and rows set apart merged."""
        built = self._built[bank]
        if built is None or not len(queries) or 2 * k >= built.size:
            # Asking an index for most of what it has is a scan with detours.
            return self._scan(bank, queries, k)
        keys = self._store.flat(bank)
        compiled = keys is not None and built.groups is None and native.suits(keys, k)
        built.gate.enter()
        try:
            size, apart, apart_keys, hidden = built.size, built.apart, built.apart_keys, built.hidden
            groups, largest = built.groups, built.largest
            if groups is not None and 2 * k >= len(groups.first):
                answer: Rows | None = np.tile(np.arange(len(groups.first)), (len(queries), 1))
            else:
                answer = self._ask(built, queries, k, whole=not compiled)
        finally:
            built.gate.leave()
        if answer is None:
            return self._scan(bank, queries, k)
        tail = self._store.lengths_list[bank] - size
        if compiled and keys is not None and groups is None:
            self._stats.rows_scanned += len(queries) * (tail + len(apart) + answer.shape[1])
            others = topk_blocks(queries, self._store.scan(bank, size), k) if tail else None
            beside = self._apart[bank]
            if beside is None or not beside.holds(hidden, apart):
                beside = self._apart[bank] = native.Apart(hidden, apart, apart_keys)
            merged, problem = native.merge(queries, keys, answer, size, k, beside, others)
            if problem is None:
                return merged
            self._fell_back(problem)
            return self._scan(bank, queries, k)
        if groups is None and not tail and not len(apart):
            return torch.from_numpy(answer).to(queries.device)
        raw = partial(self._store.take, bank) if keys is None else keys
        if groups is not None:
            chosen = _reaching(groups, largest, built.transform, queries, raw, answer, k)
            many = 2 * np.where(chosen < 0, 0, groups.counts.take(chosen)).sum(axis=1) > size
            if many.any():
                # Most keys are of the kinds that were found: a scan takes no longer.
                place = torch.from_numpy(many).to(queries.device)
                rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
                rows[place] = pad_rows(self._scan(bank, queries[place], k), k)
                if not many.all():
                    rows[~place] = pad_rows(self._search_bank(bank, queries[~place].contiguous(), k), k)
                return rows
            answer = groups.rows(chosen)
        self._stats.rows_scanned += len(queries) * (tail + len(apart) + answer.shape[1])
        if not tail and len(apart) and len(queries) <= _SMALL_BATCH and keys is not None:
            return torch.from_numpy(
                merged_few(queries.numpy(), keys.numpy(), answer, hidden, apart.numpy(), apart_keys.numpy(), k)
            )
        found = []
        if len(apart):
            # -1 stays -1, whatever the last flag says.
            answer = np.where(hidden.take(answer), -1, answer)
            # All of them: choosing among the few takes longer than carrying them along.
            apart = apart.to(queries.device)
            found.append((apart.expand(len(queries), -1), queries @ apart_keys.to(queries.device).T))
        rows = torch.from_numpy(answer).to(queries.device)
        found.append((rows, rescore(queries, raw, rows)))
        if tail:
            found.append(topk_blocks(queries, self._store.scan(bank, size), k))
        return best_of(torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found], 1), k)[0]

    def _ask(self, built: Built, queries: Tensor, k: int, whole: bool) -> Rows | None:
        """Checked rows or groups (q, k) from the index, or None where it failed."""
        index: Any = built.index
        for name in self.query_args:
            if hasattr(index, name):
                setattr(index, name, getattr(self, name))
        if hasattr(index, "threads"):
            index.threads = self.threads_for(len(queries))
        try:
            rows, problem = built.ask(queries.cpu(), k, whole)
        except (MissingLibraryError, SettingError):
            raise
        except Exception as error:
            problem = f"search failed: {type(error).__name__}: {error}"
        if problem:
            self._fell_back(problem)
            return None
        return rows

    def _fell_back(self, problem: str) -> None:
        self._stats.fallbacks += 1
        if not self._warned:
            self._warned = True
            name = type(self).__name__
            warnings.warn(
                f"{name}: {problem}. Exact search answers instead, here and whenever it happens again "
                "(counted in stats().fallbacks).",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tensors_to_save(self) -> dict[str, Tensor]:
        kept = {f"queries.{bank}": self._reservoir.bank(bank).clone() for bank in range(self.banks)}
        return {**super()._tensors_to_save(), **kept}

    def _restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        super()._restore_tensors(tensors)
        for bank in range(self.banks):
            self._reservoir.restore(bank, tensors[f"queries.{bank}"])

    def __getstate__(self) -> dict[str, Any]:
        # Indexes of foreign libraries do not pickle; they are rebuilt from the keys when next needed.
        return {
            **super().__getstate__(),
            "_built": [None] * self.banks,
            "_jobs": [None] * self.banks,
            "_apart": [None] * self.banks,
        }


def _reaching(
    groups: Groups,
    largest: Tensor | None,
    transform: FittedTransform,
    queries: Tensor,
    keys: Tensor | Callable[[Tensor], Tensor],
    found: Rows,
    k: int,
) -> Rows:
    """Of groups (q, m) that were found and the largest ones: those with rows among the k best, -1 for the others."""
    assert largest is not None
    found = np.where(np.isin(found, groups.largest), -1, found)
    first = torch.from_numpy(np.where(found < 0, -1, groups.first.take(found))).to(queries.device)
    beside = queries @ largest.to(queries.device).T
    scores, order = torch.cat((rescore(queries, keys, first), beside), 1).sort(dim=1, descending=True)
    found = np.concatenate((found, np.broadcast_to(groups.largest, beside.shape)), axis=1)
    slack = groups.distance**0.5 * transform.lengths(queries)
    ordered = np.take_along_axis(found, order.cpu().numpy(), axis=1)
    return groups.reaching(ordered, scores.cpu().numpy(), slack, k)
