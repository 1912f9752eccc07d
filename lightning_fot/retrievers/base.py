"""The retriever interface: which rows of a memory score highest for a query (retrievers.md, section 1)."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_fot.config.retriever import SETTING, TransformSpec, check_value, resolve_transform
from lightning_fot.errors import SettingError
from lightning_fot.retrievers.index.transforms import USUAL, usual_size
from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.checks import all_finite, checked_banks
from lightning_fot.retrievers.keys.removed import Removed
from lightning_fot.retrievers.keys.scan import best_of, pad_rows, rescore, stacked, topk_blocks
from lightning_fot.retrievers.keys.store import KeyStore
from lightning_fot.retrievers.stats import RetrieverStats
from lightning_fot.system.digests import read_sealed, write_sealed
from lightning_fot.system.lasting import lasting
from lightning_fot.system.tensor_files import load_tensors, save_tensors


class Retriever(ABC):  # noqa: B024 - a subclass may change no more than how it searches, and exact search is complete
    """Finds the keys with the largest inner product, separately in each bank. It returns row numbers, never values.

    A bank is one (sequence, KV head) of one memory layer; the query heads of a group are folded into the query
    dimension. Row numbers count the keys of a bank in the order they were added.

    Subclass :class:`~lightning_fot.retrievers.PerBankRetriever` to bring one index of one bank. A direct subclass
    overrides ``_search``; without it the search is exact.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        seed: For everything random: sampling, training of cells, graph levels.
        num_threads: Threads of a search or build; 0 leaves the choice to torch's setting.
        transform: ``"auto"`` (the backend's default), ``"none"`` or ``{"center", "query_power", "l2_augment"}``.
        min_index_size: Below this many keys a bank is searched exactly: no index beats a scan there.
        build: ``"background"``: indexes are built and extended beside the caller, in one thread for the whole process,
            and keys that no index covers yet are scanned. ``"blocking"``: the search that finds too many of them builds
            and waits, so that what is found never depends on the time.
        duplicate_distance: Where a bank repeats itself, keys at most so far apart are indexed once (squared distance
            after the transform, as a share of the largest from their mean). 0 keeps them all; None is what suits
            the backend (``default_duplicate_distance``): graphs need it, cells do not, exact search has no use for it.

    Raises:
        SettingError: An argument is out of its range.
    """

    exact: ClassVar[bool] = False
    query_args: ClassVar[tuple[str, ...]] = ()
    default_transform: ClassVar[TransformSpec] = TransformSpec()
    default_duplicate_distance: ClassVar[float] = 0.0

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        *,
        seed: int = 0,
        num_threads: int = 0,
        transform: str | dict[str, Any] = "auto",
        min_index_size: int = 16384,
        build: str = "background",
        duplicate_distance: float | None = None,
    ) -> None:
        for name, value in (("dim", dim), ("banks", banks)):
            check_value(name, value, name)
        for name, value in (("seed", seed), ("num_threads", num_threads), ("min_index_size", min_index_size)):
            check_value(name, value)
        check_value("build", build)
        check_value("duplicate_distance", duplicate_distance)
        self.dim = dim
        self.banks = banks
        self.seed = seed
        self.num_threads = num_threads
        self.transform = resolve_transform(transform, self.default_transform)
        self.min_index_size = min_index_size
        self.build = build
        self.duplicate_distance = (
            self.default_duplicate_distance if duplicate_distance is None else float(duplicate_distance)
        )
        self._store = KeyStore(dim, banks)
        self._owns_store = True
        self._removed = Removed(banks)
        self._stats = RetrieverStats()
        # Reentrant: one change at a time, and searches in several threads meanwhile.
        self._lock = RLock()

    @property
    def store(self) -> KeyStore:
        """The key buffer that is searched."""
        return self._store

    @property
    def lengths(self) -> Tensor:
        """Keys of each bank, (banks,) int64."""
        return self._store.lengths

    @property
    def indexed(self) -> Tensor:
        """Keys of each bank that an index covers, (banks,) int64; the others are scanned."""
        return torch.zeros(self.banks, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes this retriever holds itself: its indexes, and its keys unless they belong to a memory."""
        return self._store.nbytes if self._owns_store else 0

    def use_store(self, store: KeyStore) -> None:
        """Search a key buffer that somebody else fills; ``add`` then copies nothing.

        Args:
            store: The caller appends to it before each ``add``.

        Raises:
            SettingError: Keys were added already, or the store has another shape.
        """
        if self._owns_store and max(self._store.lengths_list) > 0:
            raise SettingError("store", store.lengths_list, "comes after keys were added", "Call use_store first.")
        if (store.dim, store.banks) != (self.dim, self.banks):
            raise SettingError(
                "store",
                (store.banks, store.dim),
                f"is not (banks={self.banks}, dim={self.dim})",
                "Make the store with the retriever's sizes.",
            )
        self._store = store
        self._owns_store = False

    @lasting
    @torch.no_grad()
    def add(self, keys: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Take in keys; row numbers go on where each bank ended.

        Args:
            keys: (banks, n, dim), any floating dtype.
            lengths: (banks,): bank b takes its first ``lengths[b]`` keys; None takes all n.

        Raises:
            SettingError: Shapes do not fit, or a key is not finite.
        """
        start = perf_counter()
        counts = self._store.checked_counts(keys, lengths)
        self._check_finite(keys, counts)
        with self._lock:
            if self._owns_store:
                self._store.append(keys, counts)
            self._truncated([length - count for length, count in zip(self._store.lengths_list, counts, strict=True)])
        self._stats.adds += 1
        self._stats.add_seconds += perf_counter() - start

    def _truncated(self, lengths: Sequence[int]) -> None:
        """Forgets what is known of rows from ``lengths[b]`` on: a store's owner may have taken keys back untold."""
        self._removed.truncate(lengths)

    @lasting
    @torch.no_grad()
    def remove(self, rows: Sequence[Tensor | None]) -> None:
        """Never return some rows again; the numbers of the others stay.

        Args:
            rows: For each bank row numbers (n,) int64, or None.

        Raises:
            SettingError: There is not one entry a bank, or a row is not there.
        """
        with self._lock:
            lengths = self._store.lengths_list
            self._truncated(lengths)
            self._removed.add(rows, lengths)

    @property
    def removed(self) -> Removed:
        """A copy of what says which rows were removed, for :meth:`taken_back`."""
        with self._lock:
            return self._removed.select(range(self.banks))

    def taken_back(self, removed: Removed) -> None:
        """Told that the owner of the store has put back what it held when ``removed`` was taken."""
        with self._lock:
            if type(self).add is not Retriever.add:
                self.renumber()
            self._truncated(self._store.lengths_list)
            self._removed = removed.select(range(self.banks))

    @lasting
    def renumber(self) -> None:
        """Take the keys of the store anew, after its owner dropped rows and numbered the others from 0."""
        self._removed = Removed(self.banks)
        if type(self).add is not Retriever.add and not self._owns_store:
            self.reset()
            self.add(self._store.view(), self._store.lengths)

    def _check_finite(self, keys: Tensor, counts: list[int]) -> None:
        # Cast first: what overflows in the stored dtype is as bad as inf.
        stored = keys.detach().to(self._store.float_dtype)
        if len(set(counts)) == 1:
            finite = bool(torch.isfinite(stored[:, : counts[0]]).all())
        else:
            finite = all(bool(torch.isfinite(stored[bank, :count]).all()) for bank, count in enumerate(counts))
        if not finite:
            raise SettingError(
                "keys", "nan or inf", f"is not finite in {self._store.dtype}", "Check the model's activations."
            )

    @lasting
    def search(self, queries: Tensor, k: int) -> Tensor:
        """Rows with the largest inner product.

        Args:
            queries: (banks, q, dim), any floating dtype and layout.
            k: Rows wanted for each query, at least 1.

        Returns:
            Row numbers (banks, q, k) int64 on the queries' device, without duplicates; -1 where there are fewer.

        Raises:
            SettingError: Shapes do not fit, a query is not finite (not asked of queries for a store on a GPU), or k is
                below 1.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SettingError("k", k, "must be a whole number of at least 1", "Try 32.")
        checked = self._checked_queries(queries)
        start, waited = perf_counter(), self._stats.wait_seconds
        if self._removed.any and type(self)._search is not Retriever._search:
            rows = self._search_the_others(checked, k).to(queries.device)
        else:
            rows = self._search(checked, k).to(queries.device)
        self._stats.searches += 1
        self._stats.queries += checked.shape[0] * checked.shape[1]
        self._stats.search_seconds += perf_counter() - start - (self._stats.wait_seconds - waited)
        return rows

    def _checked_queries(self, queries: Tensor) -> Tensor:
        if queries.dim() != 3 or queries.shape[0] != self.banks or queries.shape[2] != self.dim:
            raise SettingError(
                "queries",
                tuple(queries.shape),
                f"is not (banks={self.banks}, q, dim={self.dim})",
                "Fold query heads into q.",
            )
        if not queries.is_floating_point():
            raise SettingError("queries", queries.dtype, "is not a floating dtype", "Convert the queries.")
        checked = queries.detach().to(device=self._store.device, dtype=torch.float32).contiguous()
        if checked.device.type not in ("cpu", "mps"):
            # Asking whether they are finite would make the host wait for the device, at each token and layer.
            return usual_size(checked)
        kind = native.sizes(checked, USUAL) if checked.is_cpu and native.library() is not None else None
        if kind == 0:
            return checked
        if kind == 2 or not all_finite(checked):
            raise SettingError("queries", "nan or inf", "is not finite", "Check the model's activations.")
        return usual_size(checked)

    def _search(self, queries: Tensor, k: int) -> Tensor:
        """Rows (banks, q, k) for checked queries (banks, q, dim): float32, contiguous, on the store's device."""
        return stacked([pad_rows(self._scan(bank, queries[bank], k), k) for bank in range(self.banks)])

    def _search_the_others(self, queries: Tensor, k: int) -> Tensor:
        """As ``_search``, without removed rows: asks for more, and scans for queries that get too few all the same."""
        self._removed.truncate(self._store.lengths_list)
        wider = self._search(
            queries, min(self._removed.wider(k, self._store.lengths_list), max(self._store.lengths_list))
        )
        found = []
        for bank, part in enumerate(wider):
            rows = part.masked_fill(self._removed.of(bank, part), -1)
            keys = rescore(queries[bank], partial(self._store.take, bank), rows)
            rows = pad_rows(best_of(rows, keys, k)[0], k)
            short = ((rows >= 0).sum(1) < min(k, self._store.lengths_list[bank] - self._removed.count(bank))).nonzero()
            if len(short):
                rows[short[:, 0]] = pad_rows(self._scan(bank, queries[bank][short[:, 0]], k), k)
            found.append(rows)
        return stacked(found)

    def _scan(self, bank: int, queries: Tensor, k: int) -> Tensor:
        """Exact rows (q, min(k, n)) of one bank; -1 where rows were removed and fewer are left."""
        self._stats.rows_scanned += queries.shape[0] * self._store.lengths_list[bank]
        return topk_blocks(queries, self._store.scan(bank), k, self._removed.mask(bank))[0]

    def observe(self, queries: Tensor) -> None:
        """Show past queries (banks, q, dim), rotated as they are searched with; backends may learn from them.

        Raises:
            SettingError: Shapes do not fit or a query is not finite.
        """
        self._checked_queries(queries)

    def flush(self) -> None:
        """Build now whatever is pending, and wait for it."""
        return

    def reset(self, banks: Sequence[int] | None = None) -> None:
        """Forget the keys of some banks, or of all. The keys of a foreign store are its owner's to reset.

        Args:
            banks: Bank numbers; None means all.

        Raises:
            SettingError: A bank number is out of range.
        """
        numbers = checked_banks(banks, self.banks)
        self._removed.reset(numbers)
        if self._owns_store:
            self._store.reset(numbers)

    def set_query_args(self, **kw: Any) -> None:
        """Change settings that need no rebuild, those named in ``query_args``.

        Raises:
            SettingError: The name is not one of them, or the value cannot work.
        """
        for name, value in kw.items():
            if name not in self.query_args:
                known = ", ".join(self.query_args) or "none"
                raise SettingError(f"{SETTING}.{name}", value, "is not a query setting", f"There are: {known}.")
            check_value(name, value)
        for name, value in kw.items():
            setattr(self, name, value)

    def stats(self) -> RetrieverStats:
        """A copy of the counters."""
        return replace(self._stats)

    def fork(self, store: KeyStore | None = None) -> Self:
        """A snapshot that shares what is built; neither side sees what the other adds later.

        Args:
            store: The fork of the key buffer to search; None forks this retriever's own.

        Returns:
            A retriever of the same kind, with fresh counters. O(1) unless a subclass keeps keys of its own (it
            overrides ``add``): that one is copied.
        """
        foreign = type(self).add is not Retriever.add
        with self._lock:
            twin = copy.deepcopy(self) if foreign else copy.copy(self)
            twin._store = self._store.fork() if store is None else store
            twin._owns_store = self._owns_store if store is None else False
            twin.num_threads = self.num_threads
            twin._removed = self._removed.select(range(self.banks))
        twin._stats = RetrieverStats()
        return twin

    def select(self, banks: Sequence[int], store: KeyStore) -> Self | None:
        """A snapshot whose bank i is bank ``banks[i]`` of this retriever, sharing what is built.

        Args:
            banks: Bank numbers, repeated ones too.
            store: The keys of those banks (:meth:`KeyStore.select`).

        Returns:
            None where a subclass keeps keys of its own: make a new one and add the keys.
        """
        if type(self).add is not Retriever.add:
            return None
        twin = self.fork(store)
        twin.banks = len(banks)
        twin._removed = self._removed.select(banks)
        return twin

    def save(self, folder: str | Path) -> None:
        """Write the keys to a folder; indexes are rebuilt from them after ``load``, from the same seed.

        Args:
            folder: Made if it is not there.
        """
        path = Path(folder)
        save_tensors(path / "keys.safetensors", self._tensors_to_save())
        write_sealed(path / "retriever.json", {"schema": 1, "dim": self.dim, "banks": self.banks})

    def load(self, folder: str | Path) -> None:
        """Replace the content by that of a saved folder.

        Raises:
            SettingError: The folder is not one, was altered, or was saved with other sizes.
        """
        path = Path(folder)
        if not (path / "retriever.json").is_file():
            raise SettingError("folder", str(folder), "holds no saved retriever", "Give the folder passed to save.")
        try:
            saved = read_sealed(path / "retriever.json")
            sizes = saved["dim"], saved["banks"]
            tensors = load_tensors(path / "keys.safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError("folder", str(folder), f"is damaged ({error})", "Add the keys again.") from error
        if sizes != (self.dim, self.banks):
            raise SettingError(
                "folder", str(folder), f"was saved with dim={sizes[0]}, banks={sizes[1]}", "Use these sizes."
            )
        self.reset()
        self._restore_tensors(tensors)

    def _tensors_to_save(self) -> dict[str, Tensor]:
        # Cloned: banks that select repeats share their mask, and safetensors writes no tensor twice.
        removed = {
            f"removed.{bank}": mask.clone()
            for bank in range(self.banks)
            if (mask := self._removed.mask(bank)) is not None
        }
        return {"keys": self._store.view().contiguous(), "lengths": self._store.lengths, **removed}

    def _restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        keys = tensors["keys"]
        if self._owns_store:
            self._store = KeyStore(self.dim, self.banks, keys.dtype, self._store.device)
            self._store.append(keys, tensors["lengths"])
        self.add(keys[:, :0])
        masks = [tensors.get(f"removed.{bank}") for bank in range(self.banks)]
        self.remove([None if mask is None else mask.nonzero()[:, 0] for mask in masks])

    def __getstate__(self) -> dict[str, Any]:
        # After a multi-threaded call a forked child hangs in OpenMP: what travels to another process uses one thread.
        state = {**self.__dict__, "num_threads": 1}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = RLock()
