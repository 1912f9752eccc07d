"""Which text a memory was read from: documents, their tokens, and the place of each stored pair in them.

A log costs 4 bytes a token read (its id) and 8 bytes a stored pair (document and position). Everything in it is
immutable but the row objects, so that a fork shares all that was logged before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

# Tokens kept before the first remaining pair of a document, so that a passage can begin a little before it.
CONTEXT_TOKENS = 256
UNKNOWN_TOKEN = -1


@dataclass(frozen=True)
class TokensRead:
    """The tokens of one reading step.

    Args:
        ids: (B, n) int64.
        valid: (B, n) bool, False for padding.
        stored: (B, n) bool, a part of ``valid``: pair i of row b is the i-th True of ``stored[b]``.
        names: Documents that the rows' tokens belong to, whatever else was begun meanwhile. None, in place of all or of
            one, goes on with what the row has begun.
    """

    ids: Tensor
    valid: Tensor
    stored: Tensor
    names: Sequence[str | None] | None = None


@dataclass(frozen=True)
class Document:
    """What a memory knows of one document.

    Args:
        number: Its number in the log that gave it, until rows are selected.
        row: The memory's row that read it.
        name: None where no name was given.
        tokens: Tokens read so far.
        stored: Pairs of each memory layer and KV head that the memory still holds.
        first: Position of the first token whose id is still kept; above 0 once the memory forgot the start.
    """

    number: int
    row: int
    name: str | None
    tokens: int
    stored: int
    first: int = 0


@dataclass(frozen=True)
class _Numbers:
    """A sequence of int32 in parts that are never changed; parts grow in size backwards, so there are few of them."""

    parts: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return sum(part.numel() for part in self.parts)

    def plus(self, new: Tensor) -> _Numbers:
        """With ``new`` behind. Each number is copied about log2(steps) times in all, and a fork shares the parts."""
        if not new.numel():
            return self
        parts, last = list(self.parts), new.to(torch.int32)
        while parts and parts[-1].numel() <= last.numel():
            last = torch.cat([parts.pop(), last])
        return _Numbers((*parts, last))

    def whole(self) -> Tensor:
        """All numbers, int32 (n,)."""
        if not self.parts:
            return torch.empty(0, dtype=torch.int32)
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def one(self) -> _Numbers:
        """The same in one part."""
        return self if len(self.parts) <= 1 else _Numbers((self.whole(),))


def _numbers(values: Tensor) -> _Numbers:
    return _Numbers((values.to(torch.int32).clone(),)) if values.numel() else _Numbers()


@dataclass(frozen=True)
class _Text:
    """A document of one row: its ids from position ``first`` on, and how many pairs are stored."""

    name: str | None
    first: int = 0
    ids: _Numbers = field(default_factory=_Numbers)
    stored: int = 0

    @property
    def tokens(self) -> int:
        return self.first + len(self.ids)


@dataclass
class _Row:
    """One row: texts by slot, and for each stored pair its slot and position."""

    texts: dict[int, _Text] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)
    current: int | None = None
    next_slot: int = 0
    slots: _Numbers = field(default_factory=_Numbers)
    positions: _Numbers = field(default_factory=_Numbers)

    def copy(self) -> _Row:
        return replace(self, texts=dict(self.texts), named=dict(self.named))

    def begin(self, name: str | None) -> None:
        if name is not None and name in self.named:
            self.current = self.named[name]
            return
        self.current = self.next_slot
        self.next_slot += 1
        self.texts[self.current] = _Text(name)
        if name is not None:
            self.named[name] = self.current

    def log(self, ids: Tensor, stored: Tensor) -> None:
        """Adds (n,) ids, of which ``stored`` (n,) bool have pairs, to the current text."""
        if not ids.numel():
            return
        if self.current is None:
            self.begin(None)
        slot = self.current
        assert slot is not None
        text = self.texts[slot]
        places = text.tokens + stored.nonzero()[:, 0]
        self.texts[slot] = replace(text, ids=text.ids.plus(ids), stored=text.stored + len(places))
        self.slots = self.slots.plus(torch.full((len(places),), slot, dtype=torch.int32))
        self.positions = self.positions.plus(places)

    def keep(self, mask: Tensor) -> None:
        slots, positions = self.slots.whole(), self.positions.whole()
        if bool(mask.all()):
            return
        lost = torch.unique(slots[~mask], return_counts=True)
        slots, positions = slots[mask], positions[mask]
        self.slots, self.positions = _Numbers((slots,)), _Numbers((positions,))
        for slot, count in zip(lost[0].tolist(), lost[1].tolist(), strict=True):
            text = self.texts[slot]
            stored = text.stored - count
            # Within a text positions only grow: the first pair left is the earliest.
            earliest = int(positions[slots == slot][0]) if stored else text.tokens
            first = max(text.first, earliest - CONTEXT_TOKENS)
            ids = text.ids if first == text.first else _numbers(text.ids.whole()[first - text.first :])
            self.texts[slot] = replace(text, first=first, ids=ids, stored=stored)
        for slot in [slot for slot, text in self.texts.items() if not text.stored and slot != self.current]:
            self.drop(slot)

    def rename(self, names: Mapping[str, str]) -> None:
        texts = {
            slot: replace(text, name=names.get(text.name, text.name)) if text.name is not None else text
            for slot, text in self.texts.items()
        }
        named = {text.name: slot for slot, text in texts.items() if text.name is not None}
        if len(named) != len(self.named):
            raise ValueError("two documents would have one name")
        self.texts, self.named = texts, named

    def drop(self, slot: int) -> None:
        """Forgets a text without pairs."""
        name = self.texts.pop(slot).name
        if name is not None:
            del self.named[name]
        if self.current == slot:
            self.current = None


@dataclass(frozen=True)
class _Before:
    """A row before tokens were logged to it, which changes one text or begins one."""

    row: _Row
    current: int | None
    next_slot: int
    slots: _Numbers
    positions: _Numbers
    text: _Text | None

    def back(self) -> None:
        row = self.row
        for slot in range(self.next_slot, row.next_slot):
            row.texts.pop(slot, None)
        row.current, row.next_slot, row.slots, row.positions = (
            self.current, self.next_slot, self.slots, self.positions,
        )  # fmt: skip
        if self.current is not None and self.text is not None:
            row.texts[self.current] = self.text


class TokenLog:
    """The texts that a memory has read, row by row, and where in them each stored pair is.

    Args:
        rows: B, independent rows.

    Example:
        >>> import torch
        >>> log = TokenLog(1)
        >>> log.begin(["a.txt"])
        >>> everything = torch.ones(1, 3, dtype=torch.bool)
        >>> log.extend(TokensRead(torch.tensor([[7, 8, 9]]), everything, torch.tensor([[False, True, True]])))
        >>> log.documents
        [Document(number=0, row=0, name='a.txt', tokens=3, stored=2, first=0)]
        >>> log.locate(0, torch.tensor([0, 1]))
        (tensor([0, 0]), tensor([1, 2]))
        >>> log.tokens(0, 1, 3)
        tensor([8, 9])
    """

    def __init__(self, rows: int) -> None:
        self._rows = [_Row() for _ in range(rows)]
        self.seen = torch.zeros(rows, dtype=torch.int64)
        """(B,) int64: tokens read in each row, padding not counted."""

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def begin(self, names: Sequence[str | None]) -> None:
        """The next tokens of each row belong to the document of that name.

        Args:
            names: One a row. A name that the row knows continues that document; None begins an unnamed one.

        Raises:
            ValueError: There are not as many names as rows.
        """
        if len(names) != len(self._rows):
            raise ValueError(f"{len(names)} document names for {len(self._rows)} rows")
        for row, name in zip(self._rows, names, strict=True):
            row.begin(name)

    def end(self) -> None:
        """The next tokens belong to no document that was begun: they will begin unnamed ones."""
        for row in self._rows:
            row.current = None

    def end_named(self) -> None:
        """The next tokens belong to no named document: who reads one says so."""
        for row in self._rows:
            if row.current is not None and row.texts[row.current].name is not None:
                row.current = None

    def extend(self, read: TokensRead) -> None:
        """Logs tokens to the current document of each row; an unnamed one is begun where there is none."""
        for row, name in zip(self._rows, read.names or (), strict=read.names is not None):
            if name is not None:
                row.begin(name)
        ids, valid, stored = read.ids.cpu(), read.valid.cpu(), read.stored.cpu()
        self.seen += valid.sum(1)
        for row, row_ids, row_valid, row_stored in zip(self._rows, ids, valid, stored, strict=True):
            row.log(row_ids[row_valid], row_stored[row_valid])

    def skip(self, counts: Tensor) -> None:
        """Logs pairs that were stored without known tokens: unnamed, with token id -1, not counted as seen.

        Args:
            counts: (B,) pairs of each row.
        """
        for row, count in zip(self._rows, counts.tolist(), strict=True):
            if count and row.current is not None and row.texts[row.current].name is not None:
                row.current = None
            row.log(torch.full((count,), UNKNOWN_TOKEN), torch.ones(count, dtype=torch.bool))

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: stored pairs of each row."""
        return torch.tensor([len(row.slots) for row in self._rows], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        texts = sum(len(text.ids) for row in self._rows for text in row.texts.values())
        return 4 * (texts + 2 * int(self.lengths.sum()))

    @property
    def documents(self) -> list[Document]:
        """Documents in the order in which each row began them, row by row."""
        return [
            Document(self._number(index, slot), index, text.name, text.tokens, text.stored, text.first)
            for index, row in enumerate(self._rows)
            for slot, text in row.texts.items()
        ]

    def document(self, number: int) -> Document:
        """The document of a number.

        Raises:
            KeyError: There is none.
        """
        row, _, text = self._text(number)
        return Document(number, row, text.name, text.tokens, text.stored, text.first)

    def find(self, name: str) -> list[Document]:
        """Documents of a name: at most one in each row."""
        known = [(index, row.named.get(name)) for index, row in enumerate(self._rows)]
        return [self.document(self._number(index, slot)) for index, slot in known if slot is not None]

    def locate(self, row: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Documents and positions of stored pairs.

        Args:
            row: Row of the memory.
            rows: (n,) int64 numbers of stored pairs, as a search gives them.

        Returns:
            Document numbers (n,) and positions in the document (n,), both int64.
        """
        held = self._rows[row]
        # Joined once here; what is logged afterwards is added to the joined part.
        held.slots, held.positions = held.slots.one(), held.positions.one()
        index = rows.cpu()
        slots = held.slots.whole()[index].long()
        return slots * len(self._rows) + row, held.positions.whole()[index].long()

    def tokens(self, number: int, start: int, stop: int) -> Tensor:
        """Ids (n,) int64 of positions ``start`` to ``stop`` of a document, clipped to what is kept."""
        _, _, text = self._text(number)
        return text.ids.whole()[max(0, start - text.first) : max(0, stop - text.first)].long()

    def rows_of(self, number: int) -> Tensor:
        """(n,) int64: numbers of the stored pairs of a document, ascending."""
        row, slot, _ = self._text(number)
        return (self._rows[row].slots.whole() == slot).nonzero()[:, 0]

    def keep(self, keep: Sequence[Tensor]) -> None:
        """Forgets pairs. Documents left without pairs go, but for those being read; so do tokens far before any pair.

        Args:
            keep: For each row (M_b,) bool over its stored pairs; those kept are numbered anew from 0.
        """
        for row, mask in zip(self._rows, keep, strict=True):
            row.keep(mask.cpu())

    def drop(self, name: str) -> None:
        """Forgets documents of a name that have no pairs; :meth:`keep` forgets pairs."""
        for row in self._rows:
            slot = row.named.get(name)
            if slot is not None and not row.texts[slot].stored:
                row.drop(slot)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives documents other names, all at once.

        Raises:
            ValueError: Two documents of a row would have one name.
        """
        for row in self._rows:
            row.rename(names)

    def mark(self) -> Callable[[], None]:
        """What takes back all that :meth:`extend` and :meth:`skip` log from now on: its cost is that of the rows."""
        seen = self.seen.clone()
        before = [
            _Before(
                row,
                row.current,
                row.next_slot,
                row.slots,
                row.positions,
                None if row.current is None else row.texts.get(row.current),
            )
            for row in self._rows
        ]

        def back() -> None:
            for row in before:
                row.back()
            self.seen = seen

        return back

    def fork(self) -> TokenLog:
        """An independent log that shares what was logged so far."""
        return self._with([row.copy() for row in self._rows], self.seen.clone())

    def select_rows(self, rows: Tensor) -> TokenLog:
        """A log whose row i has what row ``rows[i]`` has here; documents get new numbers."""
        index = rows.tolist()
        return self._with([self._rows[row].copy() for row in index], self.seen[index].clone())

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """All of the log, as tensors (int32 but for ``seen``) and dictionaries that JSON can hold."""
        documents = [
            {"row": index, "slot": slot, "name": text.name, "first": text.first, "kept": len(text.ids)}
            for index, row in enumerate(self._rows)
            for slot, text in row.texts.items()
        ]
        texts = [text.ids.whole() for row in self._rows for text in row.texts.values()]
        current = [-1 if row.current is None else row.current for row in self._rows]
        tensors = {
            "seen": self.seen.clone(),
            "pairs": self.lengths.int(),
            "current": torch.tensor(current, dtype=torch.int32),
            "next_slot": torch.tensor([row.next_slot for row in self._rows], dtype=torch.int32),
            "pair_slots": _joined([row.slots.whole() for row in self._rows]),
            "pair_positions": _joined([row.positions.whole() for row in self._rows]),
            "tokens": _joined(texts),
        }
        return tensors, documents

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], documents: Sequence[dict[str, Any]]) -> Self:
        """The log that :meth:`state` described.

        Raises:
            ValueError: The parts do not fit together.
            KeyError: A part is missing.
        """
        counts, texts = tensors["pairs"].tolist(), [int(document["kept"]) for document in documents]
        rows = len(counts)
        if len(tensors["pair_slots"]) != sum(counts) or len(tensors["tokens"]) != sum(texts):
            raise ValueError("the token log has more or fewer numbers than its documents and rows say")
        log = cls(rows)
        log.seen = tensors["seen"].to(torch.int64).clone()
        slots, positions = (torch.split(tensors[name], counts) for name in ("pair_slots", "pair_positions"))
        for index, row in enumerate(log._rows):
            current = int(tensors["current"][index])
            row.current = None if current < 0 else current
            row.next_slot = int(tensors["next_slot"][index])
            row.slots, row.positions = _numbers(slots[index]), _numbers(positions[index])
        stored = [torch.bincount(row.slots.whole(), minlength=row.next_slot).tolist() for row in log._rows]
        for document, ids in zip(documents, torch.split(tensors["tokens"], texts), strict=True):
            index, slot, name = int(document["row"]), int(document["slot"]), document["name"]
            row = log._rows[index]
            row.texts[slot] = _Text(name, int(document["first"]), _numbers(ids), stored[index][slot])
            if name is not None:
                row.named[name] = slot
        return log

    def __repr__(self) -> str:
        return f"TokenLog(rows={len(self)}, documents={len(self.documents)}, seen={self.seen.tolist()})"

    def _number(self, row: int, slot: int) -> int:
        return slot * len(self._rows) + row

    def _text(self, number: int) -> tuple[int, int, _Text]:
        slot, row = divmod(number, len(self._rows))
        if slot not in self._rows[row].texts:
            raise KeyError(f"no document {number} in this log")
        return row, slot, self._rows[row].texts[slot]

    @classmethod
    def _with(cls, rows: list[_Row], seen: Tensor) -> TokenLog:
        other = cls(0)
        other._rows, other.seen = rows, seen
        return other


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
