"""Windows of the documents of a memory: where most of a score lies, and where the words of a question stand together.

Attention to single pairs does not see every question through: beside ten thousand tokens, two windows of 64 that drew
most of it held the answer to 24 of 64 questions by a stranger to this project, and two that held the question's rarest
words to 44. Each finds what the other does not, so that they are added (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot.memory.token_log import UNKNOWN_TOKEN, Document, TokenLog

# What attention counts beside words, each by its best window.
_ATTENTION = 0.5
# Sums that differ by less are the same; weights of words are logarithms.
_SAME = 1e-9


@dataclass(frozen=True)
class AskedWords:
    """The words of a question, as tokens that are spelled alike.

    Args:
        spelling: (V + 1,) int64, a number for each token id, the same for tokens that are spelled alike; below 0 where
            a token is no word. The last one is for unknown tokens.
        asked: (n,) int64 token ids of the question.
    """

    spelling: Tensor
    asked: Tensor

    def of(self, ids: Tensor) -> Tensor:
        """Numbers of token ids, of the shape of ``ids``; a vocabulary may be padded beyond its tokens."""
        known = (ids >= 0) & (ids < len(self.spelling) - 1)
        return self.spelling[ids.where(known, len(self.spelling) - 1)]

    def numbers(self) -> list[int]:
        """Of the question's words, each once, ascending."""
        return sorted({number for number in self.of(self.asked).tolist() if number >= 0})


class Line:
    """All documents of a row on one line, a window apart, so that no window reaches from one into the next.

    Args:
        log: Of the memory.
        row: Row of the memory.
        length: Widest window.
    """

    def __init__(self, log: TokenLog, row: int, length: int) -> None:
        self._log = log
        self.length = length
        self.documents = [document for document in log.documents if document.row == row]
        self._starts: dict[int, int] = {}
        self.size = 0
        for document in self.documents:
            self._starts[document.number] = self.size - document.first
            self.size += document.tokens - document.first + length
        self.bounds = [
            (self._starts[one.number] + one.first, self._starts[one.number] + one.tokens) for one in self.documents
        ]
        """Where each document is on the line, (start, stop)."""

    def places(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """Places (n,) int64 of positions in documents."""
        return positions + torch.tensor([self._starts[number] for number in numbers.tolist()], dtype=torch.int64)

    def found(self, start: int) -> tuple[Document, int]:
        """The document at a place, and what is to be taken off a place for a position in it."""
        number = next(number for number, (low, high) in enumerate(self.bounds) if low <= start < high)
        document = self.documents[number]
        return document, self._starts[document.number]

    def ids(self) -> Tensor:
        """(size,) int64 token ids, unknown between documents."""
        line = torch.full((self.size,), UNKNOWN_TOKEN, dtype=torch.int64)
        for document, (low, high) in zip(self.documents, self.bounds, strict=True):
            line[low:high] = self._log.tokens(document.number, document.first, document.tokens)
        return line

    def beginnings(self) -> Tensor:
        """(size,) bool: places where a whole window begins, or a document that is shorter than one."""
        there = torch.zeros(self.size, dtype=torch.bool)
        for low, high in self.bounds:
            there[low : max(low + 1, high - self.length + 1)] = high > low
        return there


def word_scores(line: Line, words: AskedWords) -> Tensor:
    """How rare the words are that a question and each window share.

    Each word counts once, by its inverse document frequency with windows for documents: log(windows / windows with it)
    (Spaerck Jones 1972). How often a word stands in a window says little when windows are short.

    Args:
        line: What was read.
        words: Of the question.

    Returns:
        (size,) float64 by the place where a window begins.
    """
    spelled = words.of(line.ids())
    beginnings = line.beginnings()
    windows = int(beginnings.sum())
    before = torch.cat([torch.zeros(1, dtype=torch.int64), beginnings.cumsum(0)])
    # Where a word begins to be in windows, and where it ends.
    changes = torch.zeros(line.size + 1, dtype=torch.float64)
    for number in words.numbers():
        places = (spelled == number).nonzero()[:, 0]
        if not len(places):
            continue
        first = (places - line.length + 1).clamp_min(0)
        first[1:] = torch.maximum(first[1:], places[:-1] + 1)
        held = int((before[places + 1] - before[first]).sum())
        if held:
            weight = math.log(windows / held)
            changes.index_add_(0, first, torch.full((len(places),), weight, dtype=torch.float64))
            changes.index_add_(0, places + 1, torch.full((len(places),), -weight, dtype=torch.float64))
    return changes.cumsum(0)[:-1].clamp_min(0) * beginnings


def best_of_both(line: Line, places: Tensor, scores: Tensor, words: AskedWords, top: int) -> list[tuple[int, int]]:
    """Windows by what is attended to in them and by the words that they share with the question, none overlapping.

    Args:
        line: What was read.
        places: (n,) int64, where something was attended to.
        scores: (n,) how much, not negative.
        words: Of the question.
        top: Windows wanted.

    Returns:
        (start, stop) of each, best first.
    """
    length = line.length
    beginnings = line.beginnings()
    attended = torch.zeros(line.size + length, dtype=torch.float64).index_add_(0, places, scores.double())
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), attended.cumsum(0)])
    attention = (sums[length : length + line.size] - sums[: line.size]).clamp_min(0) * beginnings
    total = _by_best(word_scores(line, words)) + _ATTENTION * _by_best(attention)
    taken: list[tuple[int, int]] = []
    while len(taken) < top and line.size:
        start = int(total.argmax())
        best = float(total[start])
        if best <= _SAME:
            break
        # Neighbouring windows that are as good: what counts comes into the middle.
        same = (total[start : start + length] < best - _SAME).nonzero()
        start += ((int(same[0]) if len(same) else min(length, line.size - start)) - 1) // 2
        _, high = next(bound for bound in line.bounds if bound[0] <= start < bound[1])
        taken.append((start, min(start + length, high)))
        total[max(0, start - length + 1) : start + length] = 0
    return taken


def _by_best(scores: Tensor) -> Tensor:
    best = float(scores.max()) if len(scores) else 0.0
    return scores / best if best > 0 else scores


def best_windows(
    places: Tensor, scores: Tensor, length: int, top: int, bounds: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Windows that hold the largest sums, taken one after the other, none overlapping another.

    Args:
        places: (n,) int64, ascending.
        scores: (n,), not negative.
        length: Widest window.
        top: Windows wanted.
        bounds: Stretches (start, stop) that windows stay within, ascending; every place is in one, and stretches are at
            least ``length`` apart.

    Returns:
        (start, stop) of each, largest sum first; as wide as ``length`` where there is room, what counts in the middle.
    """
    taken: list[tuple[int, int]] = []
    scores = scores.double()
    for _ in range(top):
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), scores.cumsum(0)])
        # A window begins at a place that counts and ends before the next one that is taken.
        barriers = torch.tensor([*sorted(start for start, _ in taken), torch.iinfo(torch.int64).max])
        last = torch.minimum(places + length, barriers[torch.searchsorted(barriers, places, right=True)])
        totals = (sums[torch.searchsorted(places, last)] - sums[:-1]).masked_fill(scores == 0, 0)
        best = int(totals.argmax())
        if float(totals[best]) <= 0:
            break
        start, stop = int(places[best]), int(last[best])
        inside = places[(places >= start) & (places < stop) & (scores > 0)]
        low, high = next((low, high) for low, high in bounds if low <= start < high)
        low = max([low, *(end for _, end in taken if end <= start)])
        high = min([high, *(begin for begin, _ in taken if begin > start)])
        start = int(inside[0]) - (length - int(inside[-1] - inside[0]) - 1) // 2
        start = max(low, min(start, high - length))
        stop = min(high, start + length)
        taken.append((start, stop))
        scores = scores.masked_fill((places >= start) & (places < stop), 0)
    return taken
