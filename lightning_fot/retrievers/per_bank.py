"""One index a bank: what third parties implement, with everything around it done here."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Protocol, Self
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.checks import checked_banks
from lightning_fot.retrievers.hubs import HubDetector, fit_hubs
from lightning_fot.retrievers.reservoir import QueryReservoir
from lightning_fot.retrievers.scan import best_of, pad_rows, rescore, topk_blocks, topk_rows
from lightning_fot.retrievers.settings import TransformSpec
from lightning_fot.retrievers.store import KeyStore
from lightning_fot.retrievers.transforms import FittedTransform, fit_transform

_MIN_TAIL = 2048
_SHARE_TO_EXTEND = 0.05
_SHARE_TO_REBUILD = 0.5
_SMALL_BATCH = 16


class Index(Protocol):
    """An index of one bank, as a plug-in writes it: larger inner product is better.

    Rows are numbered in the order of adding. Optional further members: ``nbytes`` (bytes held) and attributes named
    in the retriever's ``query_args`` and ``threads``, which are set before each search where they exist.
    """

    def add(self, keys: NDArray[np.float32]) -> None:
        """Append keys (n, dim), contiguous."""

    def search(self, queries: NDArray[np.float32], k: int) -> Any:
        """Rows (q, k) of any integer dtype for queries (q, dim), contiguous; -1 where there are fewer."""


@dataclass(eq=False)
class _Built:
    """An index over rows 0..size-1. Never changed while several retrievers own it.

    ``apart`` are rows that the index holds but is not asked for: hubs and outliers, scored exactly in every search.
    """

    index: Index
    transform: FittedTransform
    hubs: HubDetector | None
    size: int
    trained_at: int
    apart: Tensor
    owners: WeakSet[PerBankRetriever] = field(default_factory=WeakSet)

    def shared_with(self, owner: PerBankRetriever) -> bool:
        """Whether another retriever, or another bank of the same one, answers with this index."""
        return len(self.owners) > 1 or sum(built is self for built in owner._built) > 1


class PerBankRetriever(Retriever):
    """Keeps one index for each bank and makes up for what the index lacks.

    Keys that no index covers yet are scanned exactly and merged; candidates are rescored against the raw keys; row
    numbers are checked; an index that fails is replaced by exact search, counted and warned of once. A subclass
    implements :meth:`new_index` and names in ``query_args`` what can change without a rebuild.

    Class attributes for subclasses: ``incremental`` (whether ``Index.add`` may be called again after a search),
    ``smallest_index`` (keys an index needs at least), ``default_transform``. The default transform ends in L2
    augmentation: its keys have one norm, so an inner-product index and an L2 index both rank rightly.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        **kwargs: Those of :class:`Retriever`.
    """

    incremental: ClassVar[bool] = True
    smallest_index: ClassVar[int] = 1
    default_transform: ClassVar[TransformSpec] = TransformSpec(center=True, query_power=0.25, l2_augment=True)

    def __init__(self, dim: int, banks: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, banks, **kwargs)
        self._built: list[_Built | None] = [None] * banks
        self._failed_at = [0] * banks
        self._reservoir = QueryReservoir(dim, banks, self.seed)
        self._warned = False

    @abstractmethod
    def new_index(self, dim: int) -> Index:
        """An empty index for vectors of ``dim`` coordinates (after the transform, not the head size)."""

    def threads_for(self, queries: int) -> int:
        """Threads worth using for a call: small batches are slower with several."""
        if queries <= _SMALL_BATCH:
            return 1
        return self.num_threads or torch.get_num_threads()

    @property
    def indexed(self) -> Tensor:
        """Keys of each bank that an index covers, (banks,) int64; the others are scanned."""
        return torch.tensor([built.size if built else 0 for built in self._built], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the indexes and of the sampled queries, and of the keys unless they belong to a memory."""
        indexes = sum(int(getattr(built.index, "nbytes", 0)) for built in self._built if built)
        return super().nbytes + indexes + self._reservoir.nbytes

    def observe(self, queries: Tensor) -> None:
        """Show past queries (banks, q, dim), rotated as they are searched with: for the query-aware map and for hubs.

        A sample is kept; the next index that is built learns from it. ``search`` changes nothing.

        Raises:
            SettingError: Shapes do not fit or a query is not finite.
        """
        checked = self._checked_queries(queries)
        if self.transform != TransformSpec() and checked.shape[1]:
            self._reservoir.observe(checked)

    @torch.no_grad()
    def flush(self) -> None:
        """Build now whatever is pending: afterwards each bank of at least ``min_index_size`` keys has no tail."""
        self._refresh(flush=True)

    def reset(self, banks: Sequence[int] | None = None) -> None:
        """Forget keys, indexes and observed queries of some banks, or of all.

        Args:
            banks: Bank numbers; None means all.

        Raises:
            SettingError: A bank number is out of range.
        """
        super().reset(banks)
        numbers = checked_banks(banks, self.banks)
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
        twin._built = list(self._built)
        twin._failed_at = list(self._failed_at)
        twin._reservoir = self._reservoir.fork()
        for built in self._built:
            if built is not None:
                built.owners.add(twin)
        return twin

    def select(self, banks: Sequence[int], store: KeyStore) -> Self | None:
        """A snapshot whose bank i is bank ``banks[i]`` of this retriever, sharing its indexes.

        Args:
            banks: Bank numbers, repeated ones too.
            store: The keys of those banks.
        """
        twin = super().select(banks, store)
        if twin is not None:
            for built in self._built:
                if built is not None:
                    built.owners.discard(twin)
            twin._built = [self._built[bank] for bank in banks]
            twin._failed_at = [self._failed_at[bank] for bank in banks]
            twin._reservoir = self._reservoir.select(banks)
            for built in twin._built:
                if built is not None:
                    built.owners.add(twin)
        return twin

    def renumber(self) -> None:
        """Drop all indexes, after the owner of the store numbered its rows anew; observed queries stay."""
        for bank in range(self.banks):
            self._drop(bank)
            self._failed_at[bank] = 0
        super().renumber()

    def _drop(self, bank: int) -> None:
        built = self._built[bank]
        self._built[bank] = None
        if built is not None and not any(other is built for other in self._built):
            built.owners.discard(self)

    def _refresh(self, flush: bool = False) -> None:
        """Build or extend the indexes whose exact tail has grown too long."""
        for bank, length in enumerate(self._store.lengths_list):
            built = self._built[bank]
            if built is not None and built.size > length:
                # The owner of the store emptied the bank without telling.
                self._drop(bank)
                built = None
            if length < max(self.min_index_size, self.smallest_index) or length < 2 * self._failed_at[bank]:
                continue
            if built is None:
                self._attempt(bank, length, None)
                continue
            tail = length - built.size
            in_place = self.incremental and not built.shared_with(self)
            share = _SHARE_TO_EXTEND if in_place else _SHARE_TO_REBUILD
            if tail > 0 and (flush or tail > max(self._min_tail, share * built.size)):
                self._attempt(bank, length, built if in_place and self._still_fits(built, length) else None)

    @property
    def _min_tail(self) -> int:
        return min(_MIN_TAIL, max(1, self.min_index_size // 8))

    def _still_fits(self, built: _Built, length: int) -> bool:
        """Whether what was learned at training (cells, mean, radius) still suits the bank."""
        return length < 2 * built.trained_at and len(built.apart) <= 64 + built.size // 32

    def _attempt(self, bank: int, length: int, extend: _Built | None) -> None:
        start = perf_counter()
        try:
            if extend is None:
                self._build(bank, length)
            else:
                self._extend(extend, bank, length)
        except (MissingLibraryError, SettingError):
            raise
        except Exception as error:
            self._drop(bank)
            # Not tried again before the bank has doubled.
            self._failed_at[bank] = length
            self._fell_back(f"building the index failed: {type(error).__name__}: {error}")
        finally:
            self._stats.build_seconds += perf_counter() - start

    def _build(self, bank: int, length: int) -> None:
        keys = self._store.rows(bank, 0, length).cpu()
        past = self._reservoir.bank(bank)
        transform = fit_transform(keys, past, self.transform)
        hubs = fit_hubs(keys, past) if self.transform != TransformSpec() else None
        moved, apart = _prepare(keys, transform, hubs)
        index = self.new_index(transform.dim)
        index.add(moved.numpy())
        self._drop(bank)
        built = _Built(index, transform, hubs, length, length, apart)
        built.owners.add(self)
        self._built[bank] = built
        self._stats.rebuilds += 1

    def _extend(self, built: _Built, bank: int, length: int) -> None:
        keys = self._store.rows(bank, built.size, length).cpu()
        moved, apart = _prepare(keys, built.transform, built.hubs)
        built.index.add(moved.numpy())
        built.apart = torch.cat((built.apart, apart + built.size))
        built.size = length

    def _search(self, queries: Tensor, k: int) -> Tensor:
        self._refresh()
        return torch.stack([pad_rows(self._search_bank(bank, queries[bank], k), k) for bank in range(self.banks)])

    def _search_bank(self, bank: int, queries: Tensor, k: int) -> Tensor:
        """Rows (q, at most k) of one bank: index, exact tail and outliers merged."""
        built = self._built[bank]
        if built is None or not len(queries) or 2 * k >= built.size:
            # Asking an index for most of what it has is a scan with detours.
            return self._scan(bank, queries, k)
        rows = self._ask(built, queries, k)
        if rows is None:
            return self._scan(bank, queries, k)
        length = self._store.lengths_list[bank]
        if len(built.apart) == 0 and length == built.size:
            return rows
        take = partial(self._store.take, bank)
        apart = built.apart.to(rows.device)
        rows = rows.masked_fill(torch.isin(rows, apart), -1)
        found = [(rows, rescore(queries, take, rows))]
        if len(apart):
            picked, scores = topk_rows(queries, take(apart), k)
            found.append((apart[picked], scores))
        if length > built.size:
            found.append(topk_blocks(queries, self._store.scan(bank, len(queries), built.size), k))
        self._stats.rows_scanned += len(queries) * (length - built.size + len(apart) + k)
        return best_of(torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found], 1), k)[0]

    def _ask(self, built: _Built, queries: Tensor, k: int) -> Tensor | None:
        """Checked rows (q, k) from the index, or None where it failed."""
        index = built.index
        for name in self.query_args:
            if hasattr(index, name):
                setattr(index, name, getattr(self, name))
        if hasattr(index, "threads"):
            index.threads = self.threads_for(len(queries))
        try:
            answer = index.search(built.transform.queries(queries.cpu()).numpy(), k)
            rows = answer if isinstance(answer, Tensor) else _as_tensor(np.asarray(answer))
            problem = _what_is_wrong(rows, len(queries), k, built.size)
        except (MissingLibraryError, SettingError):
            raise
        except Exception as error:
            problem = f"search failed: {type(error).__name__}: {error}"
        if problem:
            self._fell_back(problem)
            return None
        return rows.to(device=queries.device, dtype=torch.int64)

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
        return {**super().__getstate__(), "_built": [None] * self.banks}


def _prepare(keys: Tensor, transform: FittedTransform, hubs: HubDetector | None) -> tuple[Tensor, Tensor]:
    """Transformed keys (n, dim) and the positions of those set apart, which the index sees as the mean key."""
    apart = hubs.find(keys) if hubs is not None else torch.zeros(0, dtype=torch.int64)
    hidden = keys.float()
    if len(apart):
        hidden = hidden.clone()
        hidden[apart] = transform.centre
    moved, outliers = transform.keys(hidden)
    return moved, torch.cat((apart, outliers)).sort().values


def _as_tensor(rows: NDArray[Any]) -> Tensor:
    # Unsigned keys (usearch): their largest value, a usual mark for "none", becomes -1.
    return torch.from_numpy(rows.astype(np.int64) if rows.dtype.kind == "u" else rows)


def _what_is_wrong(rows: Tensor, queries: int, k: int, size: int) -> str | None:
    """Why rows returned by an index cannot be used; None when they can."""
    if tuple(rows.shape) != (queries, k):
        return f"the index returned shape {tuple(rows.shape)} instead of {(queries, k)}"
    if rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool:
        return f"the index returned {rows.dtype} instead of row numbers"
    if int(rows.min()) < -1 or int(rows.max()) >= size:
        return f"the index returned rows outside -1 to {size - 1}"
    ordered = rows.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        return "the index returned a row twice"
    return None
