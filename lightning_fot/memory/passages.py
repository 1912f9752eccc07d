"""Which passages of what was read a model attended to, from the weights of the one softmax over local and memory.

Some keys draw every query: in a memory of SmolLM2 one pair takes the largest share in all heads, whatever is asked. So
pairs are ranked by *corrected* mass. Of each layer and KV head, with Q queries of which n found the pair:

    corrected(pair) = log((Q + 1) / n)² · sum over queries of share²

``share`` is the pair's part of what the query gave to the memory as a whole. The first factor is the inverse document
frequency of text search, with queries in the place of documents; the square favours pairs that few queries want much
over pairs that many want a little. Attention says where a model looked, not what made it answer as it did.

Beside the trace of a prompt that asks for nothing in particular there is a sharper measure, *excess*: of each layer and
KV head, the mean weight that the queries gave to the pair, less twice what those of the other prompt gave to it, where
that is above 0. What any prompt attends to is gone; what this one asks for is left (calibration by a content-free
query, as in In-Context Re-ranking, arXiv 2410.02642, here for each head and pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.memory.windows import AskedWords, Line, best_of_both, best_windows

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.memory.token_log import Document

Queries = Literal["prompt", "answer", "both"]
# A pair's key in the sums: bank (row · G + KV head) above this many bits of pair number.
_PAIR_BITS = 40
# What another prompt attends to as well counts against a pair so many times: once found less, three times no more.
_AGAINST = 2.0
# Entries that wait before they are summed: 2**20 take 20 MiB.
_WAITING = 2**20


@dataclass(frozen=True)
class Passage:
    """A stretch of a document that was attended to.

    Args:
        document: Where it is.
        start: Position of its first token in the document.
        stop: Position behind its last token.
        mass: Its part of all attention that went to the memory, 0 to 1.
        lift: Its part of all corrected mass, or of all excess, 0 to 1: what passages are ranked by.
        token_ids: (stop - start,) int64.
    """

    document: Document
    start: int
    stop: int
    mass: float
    lift: float
    token_ids: Tensor


@dataclass
class _Sums:
    """Of one layer: for each pair that was found, its mass, its squared shares, and how many queries found it."""

    kv_heads: int
    rows: int
    queries: Tensor
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    values: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.float32))
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.waiting.append((keys, values))
        if sum(len(part) for part, _ in self.waiting) > max(_WAITING, len(self.keys)):
            self.settle()

    def settle(self) -> None:
        """Sums what waits, so that a pair has one entry."""
        if not self.waiting:
            return
        keys = torch.cat([self.keys, *(part for part, _ in self.waiting)])
        values = torch.cat([self.values, *(part for _, part in self.waiting)])
        self.keys, place = torch.unique(keys, return_inverse=True)
        self.values = torch.zeros(len(self.keys), 3, dtype=torch.float32).index_add_(0, place, values)
        self.waiting = []


@dataclass(frozen=True)
class _Noted:
    """One step of one layer, as :meth:`AttentionTrace.add` takes it; on the CPU."""

    weights: Tensor
    rows: Tensor | None
    valid: Tensor | None
    forgotten: Tensor

    def kind(self) -> tuple[Any, ...]:
        """The same of steps that can be joined."""
        whole = (id(self),) if self.valid is not None else ()
        return *self.weights.shape[::3], self.rows is None, id(self.forgotten), *whole

    @staticmethod
    def joined(steps: Sequence[_Noted]) -> _Noted:
        """Steps of one kind as one, with the queries of all."""
        first = steps[0]
        if len(steps) == 1:
            return first
        rows = None if first.rows is None else torch.cat([step.rows for step in steps if step.rows is not None], 2)
        return _Noted(torch.cat([step.weights for step in steps], 2), rows, None, first.forgotten)


class AttentionTrace:
    """Attention to stored pairs, summed as it comes: made by ``MemoryLM.record_attention``.

    Kept apart are the queries of the *prompt* and those of the *answer*: the ones that chose a token of it, so the
    prompt's last token and every generated one but the last. What it takes grows with the pairs found, 20 bytes each.
    """

    def __init__(self) -> None:
        self.answering = False
        """Whether the queries that come belong to an answer."""
        self._sums: dict[tuple[bool, int], _Sums] = {}
        # What came and is not summed yet: many small steps at once cost little more than one.
        self._noted: dict[tuple[bool, int], list[_Noted]] = {}
        self._entries = 0

    def add(
        self, layer_idx: int, weights: Tensor, *, rows: Tensor | None, valid: Tensor | None, forgotten: Tensor
    ) -> None:
        """Notes the weights of one layer.

        Args:
            layer_idx: Layer.
            weights: (B, G, R·T, K) softmax weights of memory pairs.
            rows: (B, G, R·T, K) int64 numbers of the pairs, -1 for none; None stands for 0 to K-1.
            valid: (B, T) bool, False for queries of padding; None means that there is none.
            forgotten: (B,) pairs that each row of the memory has dropped: added to pair numbers, it makes them lasting.
        """
        batch, heads = weights.shape[:2]
        sums = self._sums.setdefault(
            (self.answering, layer_idx), _Sums(heads, batch, torch.zeros(batch, dtype=torch.int64))
        )
        if (sums.kv_heads, sums.rows) != (heads, batch):
            raise SettingError(
                "record_attention", f"{batch} rows", f"came after {sums.rows} rows", "Record each batch apart."
            )
        # Copies: they may be parts of what is much larger.
        noted = _Noted(
            weights.to("cpu", torch.float32, copy=True),
            None if rows is None else rows.to("cpu", copy=True),
            None if valid is None else valid.to("cpu", copy=True),
            forgotten,
        )
        self._noted.setdefault((self.answering, layer_idx), []).append(noted)
        self._entries += weights.numel()
        if self._entries > _WAITING:
            self._sum()

    def _sum(self) -> None:
        """Sums what was noted."""
        for key, steps in self._noted.items():
            for _, alike in groupby(steps, _Noted.kind):
                self._add(self._sums[key], _Noted.joined(list(alike)))
        self._noted, self._entries = {}, 0

    @staticmethod
    def _add(sums: _Sums, noted: _Noted) -> None:
        weights, valid = noted.weights, noted.valid
        batch, heads, count, found = weights.shape
        pairs = torch.arange(found).expand(weights.shape) if noted.rows is None else noted.rows
        if valid is not None:
            repeats = count // valid.shape[1]
            weights = weights * valid[:, None, None].expand(-1, -1, repeats, -1).reshape(batch, 1, count, 1)
            asked = valid.sum(1) * repeats
        else:
            asked = torch.full((batch,), count)
        shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        sums.queries = sums.queries + asked
        banks = torch.arange(batch * heads).reshape(batch, heads, 1, 1) << _PAIR_BITS
        keys = banks + pairs + noted.forgotten.reshape(batch, 1, 1, 1)
        there = (weights > 0) & (pairs >= 0)
        mass = weights[there]
        sums.add(keys[there], torch.stack([mass, shares[there] ** 2, torch.ones_like(mass)], dim=1))

    def pair_mass(self, memory: Memory, row: int = 0, queries: Queries = "both") -> tuple[Tensor, Tensor]:
        """Mass and corrected mass of every stored pair of a row, summed over layers and KV heads.

        Args:
            memory: The memory that was attended to, as it is or was.
            row: Row of the memory. Beams of a prompt count for the row of the prompt.
            queries: Whose attention counts.

        Returns:
            Two (M,) float32 tensors; a mass is in units of queries times heads.

        Raises:
            SettingError: The recorded rows are not those of the memory.
        """
        mass, corrected = torch.zeros(2, int(memory.lengths[row]), dtype=torch.float32)
        for table, asked in self._tables(memory, row, queries).values():
            mass += table[0].sum(0)
            rarity = torch.log((asked + 1) / table[2].clamp_min(1)).clamp_min(0)
            corrected += (rarity**2 * table[1]).sum(0)
        return mass, corrected

    def pair_excess(
        self, memory: Memory, against: AttentionTrace, row: int = 0, queries: Queries = "both"
    ) -> tuple[Tensor, Tensor]:
        """Mass of every stored pair of a row, and its excess over what another prompt attended to.

        Args:
            memory: The memory that both attended to.
            against: Trace of the other prompt.
            row: Row of the memory.
            queries: Whose attention counts, in both.

        Returns:
            Two (M,) float32 tensors: mass in units of queries times heads, excess in units of heads.

        Raises:
            SettingError: The recorded rows are not those of the memory.
        """
        mass, excess = torch.zeros(2, int(memory.lengths[row]), dtype=torch.float32)
        others = against._tables(memory, row, queries)
        for layer, (table, asked) in self._tables(memory, row, queries).items():
            mass += table[0].sum(0)
            mean = table[0] / max(1, asked)
            if layer in others:
                other, count = others[layer]
                mean = (mean - _AGAINST * other[0] / max(1, count)).clamp_min(0)
            excess += mean.sum(0)
        return mass, excess

    def _tables(self, memory: Memory, row: int, queries: Queries) -> dict[int, tuple[Tensor, int]]:
        """By layer: (3, G, M) of mass, squared shares and queries that found each pair, and how many queries asked."""
        self._sum()
        stored = int(memory.lengths[row])
        chosen = {"prompt": (False,), "answer": (True,), "both": (False, True)}[queries]
        tables = {}
        for layer in sorted({layer for _, layer in self._sums}):
            parts = [self._sums[phase, layer] for phase in chosen if (phase, layer) in self._sums]
            if not parts:
                continue
            heads = parts[0].kv_heads
            table = torch.zeros(3, heads, stored, dtype=torch.float32)
            asked = 0
            for sums in parts:
                copies, rest = divmod(sums.rows, memory.batch_size)
                if rest or not copies:
                    raise SettingError(
                        "memory", f"{memory.batch_size} rows", f"is not what was attended to ({sums.rows} rows)",
                        "Give the memory that was read from.",
                    )  # fmt: skip
                sums.settle()
                bank, pair = sums.keys >> _PAIR_BITS, sums.keys & ((1 << _PAIR_BITS) - 1)
                pair = pair - int(memory.forgotten[row])
                # Pairs of the prompt itself may have moved into the memory's copy behind those stored here.
                mine = (bank // heads // copies == row) & (pair >= 0) & (pair < stored)
                flat = (bank % heads * stored + pair)[mine]
                table.view(3, -1).index_add_(1, flat, sums.values[mine].T)
                asked += int(sums.queries[row * copies : (row + 1) * copies].sum())
            tables[layer] = table, asked
        return tables

    def passages(
        self,
        memory: Memory,
        length: int = 64,
        top: int = 5,
        row: int = 0,
        queries: Queries = "both",
        against: AttentionTrace | None = None,
        words: AskedWords | None = None,
    ) -> list[Passage]:
        """The stretches of the documents of a row that drew most attention, best first; none overlaps another.

        Args:
            memory: The memory that was attended to.
            length: Tokens of a passage; less where a document, or what is left of it, is shorter.
            top: Passages wanted.
            row: Row of the memory.
            queries: Whose attention counts.
            against: Trace of a prompt that asks for nothing in particular, beside the same memory: passages are ranked
                by what is attended to in excess of it.
            words: Of the prompt: passages are ranked by the words that they share with it, too.

        Raises:
            SettingError: A number is below 1, or the recorded rows are not those of the memory.
        """
        for name, value in (("length", length), ("top", top)):
            if value < 1:
                raise SettingError(name, value, "must be at least 1", "Correct it.")
        if against is None:
            mass, corrected = self.pair_mass(memory, row, queries)
        else:
            mass, corrected = self.pair_excess(memory, against, row, queries)
        attended = corrected.nonzero()[:, 0]
        if not len(attended) and words is None:
            return []
        line = Line(memory.log, row, length)
        places = line.places(*memory.log.locate(row, attended))
        places, order = places.sort()
        # Nothing may be attended to where words are shared.
        tiny = torch.finfo(torch.float32).tiny
        found, all_mass, all_corrected = [], float(mass.sum()), float(corrected.sum())
        scores = corrected[attended][order]
        windows = (
            best_windows(places, scores, length, top, line.bounds)
            if words is None
            else best_of_both(line, places, scores, words, top)
        )
        for start, stop in windows:
            document, offset = line.found(start)
            inside = attended[order][(places >= start) & (places < stop)]
            start, stop = start - offset, stop - offset
            found.append(
                Passage(
                    document,
                    start,
                    stop,
                    float(mass[inside].sum()) / max(all_mass, tiny),
                    float(corrected[inside].sum()) / max(all_corrected, tiny),
                    memory.log.tokens(document.number, start, stop),
                )
            )
        return found
