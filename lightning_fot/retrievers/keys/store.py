"""Append-only stores of vectors, shared copy-on-write: a fork, or a choice of banks, costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_fot.config.retriever import check_value
from lightning_fot.errors import SettingError
from lightning_fot.retrievers.keys.checks import checked_banks, checked_counts
from lightning_fot.retrievers.keys.codes import CodeBook
from lightning_fot.retrievers.keys.quantiser import Quantiser
from lightning_fot.retrievers.keys.scan import Block
from lightning_fot.retrievers.keys.segment import Segment

_BLOCK = 65536
_MOST_PARTS = 4
# A shared end of at most this many rows is copied; a longer one is left as it is, and a new segment begun behind it.
_CHEAP_TO_COPY = 1024
_LARGEST_CODED = 1e36  # on the way back from eight bits a larger one could overflow
_FITTED_TO = 64  # stored vectors that a quantiser is fitted to, at least, beside new ones

Raw = tuple[Tensor, Tensor | None]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Part:
    """A segment as one store sees it.

    Args:
        segment: The vectors.
        banks: For each bank of the store, the bank of the segment.
        starts: For each bank of the store, its row that comes first in the segment.
    """

    segment: Segment
    banks: list[int]
    starts: list[int]

    @property
    def own_banks(self) -> bool:
        return self.banks == list(range(self.segment.banks))

    def copy(self, chosen: Sequence[int] | None = None) -> _Part:
        numbers = range(len(self.banks)) if chosen is None else chosen
        return _Part(self.segment, [self.banks[n] for n in numbers], [self.starts[n] for n in numbers])


def _alone(method: Callable[Concatenate[KeyStore, P], R]) -> Callable[Concatenate[KeyStore, P], R]:
    """One change at a time among all stores that share segments: who may write behind an end is decided by claims."""

    @wraps(method)
    def changed(self: KeyStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._family:
            return method(self, *args, **kwargs)

    return changed


class KeyStore:
    """Vectors of several banks, numbered in the order they were added.

    Rows never change. A fork shares what is there: either side goes on in the same buffer for as long as nobody else
    has written behind its own end, and begins a segment of its own otherwise; the shared past is not copied. A store
    may be read while another thread adds to it; forks may be changed in several threads.

    Args:
        dim: Size D of a vector.
        banks: Independent key sets, one for each (sequence, KV head).
        dtype: Stored dtype: a floating one, or ``torch.int8`` (a byte a coordinate and a scale a vector).
        device: Where the vectors lie.
        folder: Keep them in a file there, which the operating system pages in and out; None keeps them in memory.

    Raises:
        SettingError: ``dim`` or ``banks`` is below 1, or the dtype cannot be stored.

    Example:
        >>> store = KeyStore(dim=2)
        >>> store.append(torch.ones(1, 3, 2))
        >>> snapshot = store.fork()
        >>> store.append(torch.zeros(1, 1, 2))
        >>> store.lengths.tolist(), snapshot.lengths.tolist()
        ([4], [3])
    """

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        folder: str | None = None,
    ) -> None:
        check_value("dim", dim, "dim")
        check_value("banks", banks, "banks")
        if not dtype.is_floating_point and dtype != torch.int8:
            raise SettingError("dtype", dtype, "cannot be stored", "Use float32, bfloat16 or int8.")
        self.dim, self.banks, self.dtype = dim, banks, dtype
        self.device = torch.empty(0, device=device).device
        self.folder = folder
        self.quantiser: Quantiser | None = None
        self._lengths = [0] * banks
        # Lists are replaced, never changed: a reader in another thread goes on with those it has.
        self._parts: list[_Part] = []
        self._family = RLock()

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype in which vectors are read."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype

    @property
    def lengths(self) -> Tensor:
        """Keys of each bank, (banks,) int64, on the CPU."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @property
    def lengths_list(self) -> list[int]:
        """Keys of each bank as Python integers (a copy)."""
        return list(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the segments, in memory or on disk, spare room included; shared ones count in full."""
        return sum(part.segment.nbytes for part in self._parts)

    @property
    def segment_bytes(self) -> dict[int, int]:
        """Bytes of each segment by its identity: stores that share one name the same."""
        return {id(part.segment): part.segment.nbytes for part in self._parts}

    def view(self) -> Tensor:
        """All keys (banks, max_len, dim) in ``float_dtype``; in shorter banks what lies past their length is arbitrary.

        A view of the buffer where there is one segment of a floating dtype, otherwise a copy.
        """
        longest, parts = max(self._lengths), self._parts
        if _simple(parts) and self.dtype != torch.int8:
            return parts[0].segment.data[:, :longest]
        whole = torch.zeros(self.banks, longest, self.dim, dtype=self.float_dtype, device=self.device)
        for bank in range(self.banks):
            for start, block in self.blocks(bank):
                whole[bank, start : start + len(block)] = block
        return whole

    def bank(self, bank: int) -> Tensor:
        """Keys of one bank (n, dim): a view where they lie together in a floating dtype, otherwise a copy."""
        return self.rows(bank, 0, self._lengths[bank])

    def rows(self, bank: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a bank, (n, dim): as :meth:`bank`."""
        pieces = [block for _, block in self.blocks(bank, start, stop, max(1, stop - start))]
        if len(pieces) == 1:
            return pieces[0]
        empty = torch.zeros(0, self.dim, dtype=self.float_dtype, device=self.device)
        return torch.cat(pieces) if pieces else empty

    def flat(self, bank: int) -> Tensor | None:
        """Keys of a bank (n, dim) where they lie together in main memory in float32; None where they do not."""
        lengths, parts = self._lengths, self._parts
        if len(parts) == 1 and self.dtype == torch.float32 and self.device.type == "cpu":
            part = parts[0]
            if not part.starts[bank]:
                return part.segment.data[part.banks[bank], : lengths[bank]]
        return None

    def blocks(
        self, bank: int, start: int = 0, stop: int | None = None, size: int = _BLOCK
    ) -> Iterator[tuple[int, Tensor]]:
        """Pieces of a bank for a scan: the first row's number and at most ``size`` keys (n, dim) each."""
        for first, (data, scales) in self._raw_blocks(bank, start, stop, size):
            yield first, self._decoded(data, scales, bank)

    def scan(self, bank: int, start: int = 0) -> Iterator[Block]:
        """Pieces of a bank from row ``start`` on, to be scored: one for each segment."""
        for first, (data, scales) in self._raw_blocks(bank, start, None, max(1, self._lengths[bank])):
            yield self._block(bank, first, data, scales)

    def scan_coded(self, bank: int) -> Iterator[tuple[Block, CodeBook | None]]:
        """As :meth:`scan`, each piece with the book that codes it in eight bits, empty until somebody asks it to.

        None where keys are kept small on purpose: in eight bits already, or in a file.
        """
        plain = self.dtype != torch.int8 and self.folder is None and self.device.type == "cpu"
        lengths, parts = self._lengths, self._parts  # in this order: what lies behind an older length is there
        for number, part in enumerate(parts):
            first, place = part.starts[bank], part.banks[bank]
            count = _ends(parts, lengths, number)[bank] - first
            if count > 0:
                block = self._block(bank, first, *part.segment.rows(place, 0, count))
                yield block, part.segment.book(place) if plain else None

    def _block(self, bank: int, first: int, data: Tensor, scales: Tensor | None) -> Block:
        if scales is None or self.quantiser is None:
            return Block(first, data)
        return Block(first, data, scales, self.quantiser, bank)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes that were made; shared ones count in full."""
        return sum(book.nbytes for part in self._parts for book in part.segment.books.values())

    def take(self, bank: int, rows: Tensor) -> Tensor:
        """Keys of one bank by row number: (*rows.shape, dim) for rows of any shape."""
        banks = torch.full((rows.numel(),), bank, dtype=torch.int64, device=self.device)
        return self._pick(banks, rows.flatten().to(self.device)).view(*rows.shape, self.dim)

    def gather(self, rows: Tensor) -> Tensor:
        """Keys of each bank by row number: (banks, n, dim) for rows (banks, n)."""
        rows = rows.to(self.device)
        banks = torch.arange(self.banks, device=self.device)[:, None].expand_as(rows)
        return self._pick(banks.flatten(), rows.flatten()).view(*rows.shape, self.dim)

    @_alone
    def append(self, keys: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Write keys behind those that each bank has.

        Args:
            keys: (banks, n, dim), any floating dtype and layout.
            lengths: (banks,): bank b takes its first ``lengths[b]`` keys; None takes all n.

        Raises:
            SettingError: Shapes do not fit, a length is not in 0..n, or the disk is full.
        """
        counts = self.checked_counts(keys, lengths)
        if max(counts) == 0:
            return
        source = keys.detach().to(self.device)
        scales = None
        if self.dtype == torch.int8:
            source, scales = self._encoded(source, counts)
        self.append_raw(source, scales, counts)

    def _encoded(self, source: Tensor, counts: list[int]) -> Raw:
        """Codes and scales of new vectors (banks, n, dim); where they need it, all is coded anew."""
        if min(counts) < source.shape[1]:
            # What lies behind the counted ones may be anything.
            places = torch.arange(source.shape[1], device=source.device)
            behind = places >= torch.tensor(counts, device=source.device)[:, None]
            source = source.masked_fill(behind[..., None], 0)
        quantiser = Quantiser.fit(source, counts) if self.quantiser is None else self.quantiser
        if self.quantiser is not None:
            for bank in quantiser.misfits(source, counts, self._lengths, _CHEAP_TO_COPY):
                # As many old ones as new ones: either kind has its say.
                stored, new = self._lengths[bank], source[bank, : counts[bank]].float()
                wanted = min(stored, max(_FITTED_TO, counts[bank]), _CHEAP_TO_COPY)
                rows = torch.linspace(0, max(0, stored - 1), wanted, dtype=torch.float64, device=self.device).long()
                quantiser = quantiser.refitted(bank, self.take(bank, rows), new)
        codes, scales = quantiser.encode(source)
        if not bool(torch.isfinite(scales).all()) or float(source.abs().max()) > _LARGEST_CODED:
            raise SettingError(
                "model.memory.dtype", "int8", f"cannot hold vectors of sizes up to {float(source.abs().max()):.2g}",
                "Use a floating dtype, such as float32.",
            )  # fmt: skip
        if self.quantiser is not None and quantiser is not self.quantiser:
            self._code_anew(quantiser)
        self.quantiser = quantiser
        return codes, scales

    def _code_anew(self, quantiser: Quantiser) -> None:
        """Codes what is stored by another quantiser, into segments of this store's own."""
        other = KeyStore(self.dim, self.banks, self.dtype, self.device, self.folder)
        for start in range(0, max(self._lengths), _BLOCK):
            counts = [max(0, min(length, start + _BLOCK) - start) for length in self._lengths]
            part = torch.zeros(self.banks, max(counts), self.dim, dtype=torch.float32, device=self.device)
            for bank, count in enumerate(counts):
                part[bank, :count] = self.rows(bank, start, start + count)
            codes, scales = quantiser.encode(part)
            other.append_raw(codes, scales, counts)
        self._replace(0, len(self._parts), other._parts)
        self._claim()

    @_alone
    def append_raw(self, data: Tensor, scales: Tensor | None, counts: Sequence[int]) -> None:
        """Write vectors as they are stored: (banks, n, dim) and, for int8, scales (banks, n) of this quantiser."""
        part = self._writable()
        segment = part.segment
        begins = [old - start for old, start in zip(self._lengths, part.starts, strict=True)]
        segment.reserve(max(b + n for b, n in zip(begins, counts, strict=True)), max(begins))
        if len(set(begins)) == 1 and len(set(counts)) == 1:
            length = slice(0, counts[0])
            segment.write(None, begins[0], data[:, length], None if scales is None else scales[:, length])
        else:
            for bank, (begin, count) in enumerate(zip(begins, counts, strict=True)):
                if count:
                    segment.write(bank, begin, data[bank, :count], None if scales is None else scales[bank, :count])
        self._lengths = [old + count for old, count in zip(self._lengths, counts, strict=True)]
        self._claim()

    def checked_counts(self, keys: Tensor, lengths: Tensor | Sequence[int] | None) -> list[int]:
        """Keys that each bank takes from ``append(keys, lengths)``.

        Raises:
            SettingError: Shapes do not fit or a length is not in 0..n.
        """
        return checked_counts(keys, lengths, self.banks, self.dim)

    @_alone
    def adopt(self, data: Tensor, scales: Tensor | None, lengths: Sequence[int]) -> None:
        """Reads existing vectors (banks, n, dim) in the stored dtype as a first segment, without copying them.

        Raises:
            SettingError: The store is not empty.
        """
        if max(self._lengths) > 0:
            raise SettingError("store", self._lengths, "is not empty", "Adopt vectors before adding any.")
        self._parts = [_Part(Segment.adopt(data, scales), list(range(self.banks)), [0] * self.banks)]
        self._lengths = list(lengths)
        self._claim()

    def raw(self, bank: int, start: int = 0, stop: int | None = None) -> Iterator[Raw]:
        """Rows of a bank as stored, in pieces: vectors (n, dim) and, for int8, scales (n,)."""
        for _, piece in self._raw_blocks(bank, start, stop, _BLOCK):
            yield piece

    def fork(self) -> KeyStore:
        """A snapshot in O(1): same keys, own length; what either side appends later is not seen by the other."""
        return self.select(range(self.banks))

    @_alone
    def select(self, banks: Sequence[int]) -> KeyStore:
        """A store whose bank i is a fork of bank ``banks[i]`` of this one: nothing is copied."""
        twin = KeyStore.__new__(KeyStore)
        twin.dim, twin.banks, twin.dtype, twin.device, twin.folder = (
            self.dim, len(banks), self.dtype, self.device, self.folder,
        )  # fmt: skip
        same = list(banks) == list(range(self.banks))
        twin.quantiser = self.quantiser
        if self.quantiser is not None and not same:
            twin.quantiser = self.quantiser.select(torch.tensor(list(banks)))
        twin._family = self._family
        twin._lengths = [self._lengths[bank] for bank in banks]
        twin._parts = [part.copy(banks) for part in self._parts]
        twin._claim()
        return twin

    @_alone
    def become(self, other: KeyStore) -> None:
        """Holds again what it held when ``other`` was forked from it."""
        self._replace(0, len(self._parts), [part.copy() for part in other._parts])
        self._lengths, self.quantiser = list(other._lengths), other.quantiser
        self._claim()

    @_alone
    def truncate(self, lengths: Sequence[int]) -> None:
        """Takes back the newest keys: bank b keeps its first ``lengths[b]``."""
        self._lengths = [min(old, new) for old, new in zip(self._lengths, lengths, strict=True)]
        for part in self._parts:
            part.starts = [min(start, end) for start, end in zip(part.starts, self._lengths, strict=True)]
        self._claim()

    @_alone
    def keep(self, masks: Sequence[Tensor]) -> None:
        """Forgets rows: bank b keeps those where ``masks[b]``, (n_b,) bool, is True; numbers start from 0 again."""
        kept = KeyStore(self.dim, self.banks, self.dtype, self.device, self.folder)
        self._copy_into(kept, [mask.nonzero()[:, 0] for mask in masks])
        self._replace(0, len(self._parts), kept._parts)
        self._lengths = kept._lengths
        self._claim()

    @_alone
    def reset(self, banks: Sequence[int] | None = None) -> None:
        """Forget the keys of some banks, or of all.

        Args:
            banks: Bank numbers; None means all.

        Raises:
            SettingError: A bank number is out of range.
        """
        numbers = checked_banks(banks, self.banks)
        self._lengths = [0 if bank in numbers else length for bank, length in enumerate(self._lengths)]
        for part in self._parts:
            part.starts = [0 if bank in numbers else start for bank, start in enumerate(part.starts)]
        if max(self._lengths) == 0:
            self._replace(0, len(self._parts), self._parts[-1:])
            self.quantiser = None
        self._claim()

    def _ends(self, number: int) -> list[int]:
        """For each bank the row behind the last that part ``number`` holds."""
        return _ends(self._parts, self._lengths, number)

    def _claim(self) -> None:
        """Tells the segments how far this store uses them."""
        for number, part in enumerate(self._parts):
            used = [0] * part.segment.banks
            for bank, start, end in zip(part.banks, part.starts, self._ends(number), strict=True):
                used[bank] = max(used[bank], end - start)
            part.segment.claims[self] = used

    def _writable(self) -> _Part:
        """The last part if this store may write behind its end, otherwise a new one."""
        if self._parts:
            part = self._parts[-1]
            own = part.segment.claims[self]
            others = [claim for store, claim in part.segment.claims.items() if store is not self]
            clash = any(theirs > mine for claim in others for theirs, mine in zip(claim, own, strict=True))
            if part.own_banks and not part.segment.fixed and not clash:
                return part
            lengths = [end - start for start, end in zip(part.starts, self._lengths, strict=True)]
            if max(lengths) <= _CHEAP_TO_COPY:
                self._merge(len(self._parts) - 1, len(self._parts))
                return self._parts[-1]
        if len(self._parts) >= _MOST_PARTS:
            sizes = [
                sum(e - s for s, e in zip(p.starts, self._ends(n), strict=True)) for n, p in enumerate(self._parts)
            ]
            largest = sizes.index(max(sizes))
            # What grew behind the largest part is merged; the part that holds most is copied only if it is the last.
            self._merge(*((largest + 1, len(sizes)) if largest + 1 < len(sizes) else (0, largest)))
            if largest + 1 < len(sizes):
                return self._parts[-1]
        part = _Part(self._new_segment(), list(range(self.banks)), list(self._lengths))
        self._parts = [*self._parts, part]
        self._claim()
        return part

    def _new_segment(self) -> Segment:
        return Segment(self.banks, self.dim, self.dtype, self.device, self.folder)

    def _merge(self, first: int, last: int) -> None:
        """Copies parts ``first`` to ``last - 1`` into one segment of this store's own."""
        merged = KeyStore(self.dim, self.banks, self.dtype, self.device, self.folder)
        starts = self._parts[first].starts if first < last else [0] * self.banks
        ends = self._ends(last - 1) if first < last else starts
        self._copy_into(merged, [torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        segment = merged._parts[0].segment if merged._parts else self._new_segment()
        self._replace(first, last, [_Part(segment, list(range(self.banks)), list(starts))])
        self._claim()

    def _replace(self, first: int, last: int, parts: list[_Part]) -> None:
        for part in self._parts[first:last]:
            part.segment.claims.pop(self, None)
        self._parts = [*self._parts[:first], *parts, *self._parts[last:]]

    def _copy_into(self, other: KeyStore, rows: Sequence[Tensor]) -> None:
        """Appends chosen rows of each bank, (n_b,) numbers, to another store as they are stored."""
        other.quantiser = self.quantiser
        longest = max(len(numbers) for numbers in rows)
        for start in range(0, longest, _BLOCK):
            parts = [numbers[start : start + _BLOCK].to(self.device) for numbers in rows]
            width = max(len(part) for part in parts)
            data = torch.zeros(self.banks, width, self.dim, dtype=self.dtype, device=self.device)
            scales = torch.zeros(self.banks, width, dtype=torch.float16, device=self.device)
            for bank, part in enumerate(parts):
                if len(part):
                    picked = self._pick_raw(torch.full_like(part, bank), part)
                    data[bank, : len(part)] = picked[0]
                    if picked[1] is not None:
                        scales[bank, : len(part)] = picked[1]
            other.append_raw(data, scales if self.dtype == torch.int8 else None, [len(part) for part in parts])

    def _raw_blocks(self, bank: int, start: int, stop: int | None, size: int) -> Iterator[tuple[int, Raw]]:
        lengths, parts = self._lengths, self._parts  # in this order: what lies behind an older length is there
        stop = lengths[bank] if stop is None else min(stop, lengths[bank])
        for number, part in enumerate(parts):
            begin, end = max(start, part.starts[bank]), min(stop, _ends(parts, lengths, number)[bank])
            offset = part.starts[bank]
            for first in range(begin, end, size):
                last = min(end, first + size)
                yield first, part.segment.rows(part.banks[bank], first - offset, last - offset)

    def _pick(self, banks: Tensor, rows: Tensor) -> Tensor:
        data, scales = self._pick_raw(banks, rows)
        return self._decoded(data, scales, banks)

    def _pick_raw(self, banks: Tensor, rows: Tensor) -> Raw:
        """Vectors (n, dim) as stored, of banks (n,) and rows (n,)."""
        if not any(self._lengths):
            return torch.zeros(len(rows), self.dim, dtype=self.dtype, device=self.device), (
                torch.zeros(len(rows), dtype=torch.float16, device=self.device) if self.dtype == torch.int8 else None
            )
        lengths, parts = self._lengths, self._parts  # in this order: what lies behind an older length is there
        if _simple(parts):
            return parts[0].segment.pick(banks, rows)
        data = torch.zeros(len(rows), self.dim, dtype=self.dtype, device=self.device)
        scales = torch.zeros(len(rows), dtype=torch.float16, device=self.device)
        for number, part in enumerate(parts):
            starts = torch.tensor(part.starts, device=self.device)[banks]
            ends = torch.tensor(_ends(parts, lengths, number), device=self.device)[banks]
            inside = ((rows >= starts) & (rows < ends)).nonzero()[:, 0]
            if len(inside):
                theirs = torch.tensor(part.banks, device=self.device)[banks[inside]]
                picked = part.segment.pick(theirs, rows[inside] - starts[inside])
                data[inside] = picked[0]
                if picked[1] is not None:
                    scales[inside] = picked[1]
        return data, scales if self.dtype == torch.int8 else None

    def _decoded(self, data: Tensor, scales: Tensor | None, banks: Tensor | int) -> Tensor:
        if scales is None or self.quantiser is None:
            return data if scales is None else data.float()
        return self.quantiser.decode(data, scales, banks)

    def __getstate__(self) -> dict[str, Any]:
        whole = self.fork()
        whole._merge(0, len(whole._parts))
        segment, used = whole._parts[0].segment, max(self._lengths)
        scales = None if segment.scales is None else segment.scales[:, :used].clone()
        raw = (segment.data[:, :used].clone(), scales, list(self._lengths))
        shape = (self.dim, self.banks, self.dtype, self.device, self.folder)
        return {"shape": shape, "quantiser": self.quantiser, "raw": raw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["shape"])  # type: ignore[misc]
        self.quantiser = state["quantiser"]
        self.adopt(*state["raw"])


def _ends(parts: Sequence[_Part], lengths: list[int], number: int) -> list[int]:
    """For each bank the row behind the last that part ``number`` holds."""
    return parts[number + 1].starts if number + 1 < len(parts) else lengths


def _simple(parts: Sequence[_Part]) -> bool:
    """Whether one segment holds everything, row for row and bank for bank."""
    return len(parts) == 1 and parts[0].own_banks and not any(parts[0].starts)
