"""Windows that share words with a question, against counting by hand; hypothesis draws documents and questions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.memory.token_log import TokenLog, TokensRead
from lightning_fot.memory.windows import AskedWords, Line, best_of_both, word_scores

# Tokens 0 to 9; 2 and 3 are spelled alike, 9 is no word.
SPELLING = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 7, -1, -1])


def log_of(documents: list[list[int]]) -> TokenLog:
    log = TokenLog(1)
    for number, ids in enumerate(documents):
        log.begin([f"document {number}"])
        row = torch.tensor([ids])
        log.extend(TokensRead(row, torch.ones_like(row, dtype=torch.bool), torch.ones_like(row, dtype=torch.bool)))
    return log


def windows_of(documents: list[list[int]], length: int) -> list[tuple[int, int, set[int]]]:
    """(document, start, spellings) of each window."""
    return [
        (number, start, {int(SPELLING[token]) for token in ids[start : start + length]})
        for number, ids in enumerate(documents)
        for start in range(max(1, len(ids) - length + 1))
    ]


TEXTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=4)


@given(TEXTS, st.lists(st.integers(0, 9), max_size=6), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_scores_are_what_counting_windows_gives(documents: list[list[int]], asked: list[int], length: int) -> None:
    line = Line(log_of(documents), 0, length)
    scores = word_scores(line, AskedWords(SPELLING, torch.tensor(asked, dtype=torch.int64)))
    windows = windows_of(documents, length)
    words = {int(SPELLING[token]) for token in asked} - {-1}
    held = {word: sum(word in there for *_, there in windows) for word in words}
    expected = torch.zeros(line.size, dtype=torch.float64)
    for number, start, there in windows:
        expected[line.bounds[number][0] + start] = sum(math.log(len(windows) / held[w]) for w in words & there)
    torch.testing.assert_close(scores, expected, atol=1e-9, rtol=0)


@given(TEXTS, st.lists(st.integers(0, 9), max_size=6), st.integers(1, 8), st.integers(0, 99), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_best_is_the_best_of_all_and_none_overlaps(
    documents: list[list[int]], asked: list[int], length: int, seed: int, top: int
) -> None:
    line = Line(log_of(documents), 0, length)
    words = AskedWords(SPELLING, torch.tensor(asked, dtype=torch.int64))
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([number for number, ids in enumerate(documents) for _ in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    places = line.places(numbers, positions)
    scores = torch.rand(len(places), generator=draw).round(decimals=1)
    found = best_of_both(line, places, scores, words, top)
    lexical = word_scores(line, words)
    attended = torch.zeros(line.size + length).index_add_(0, places, scores).double()
    sums = attended.unfold(0, length, 1)[: line.size].sum(-1) * line.beginnings()
    total = lexical / max(float(lexical.max()), 1e-300) + 0.5 * sums / max(float(sums.max()), 1e-300)
    if found:
        assert float(total[found[0][0]]) == pytest.approx(float(total.max()), abs=1e-6)
    else:
        assert float(total.max()) < 1e-6
    for number, (start, stop) in enumerate(found):
        low, high = next(bound for bound in line.bounds if bound[0] <= start < bound[1])
        assert stop == min(start + length, high)
        assert stop - start == min(length, high - low)
        assert all(stop <= other or end <= start for other, end in found[:number])


def test_words_decide_where_attention_sees_nothing_and_attention_where_no_word_is_shared() -> None:
    documents = [[9] * 20, [9] * 8 + [3] + [9] * 11, [9] * 20]
    line = Line(log_of(documents), 0, 5)
    places, nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
    # Asked for by a token that is spelled alike; the word stands in the middle.
    assert best_of_both(line, places, nothing, AskedWords(SPELLING, torch.tensor([2])), 2) == [
        (line.bounds[1][0] + 6, line.bounds[1][0] + 11)
    ]
    attended = torch.tensor([line.bounds[2][0] + 9])
    assert best_of_both(line, attended, torch.ones(1), AskedWords(SPELLING, torch.tensor([7])), 2) == [
        (line.bounds[2][0] + 7, line.bounds[2][0] + 12)
    ]


def test_tokens_beyond_the_tokenizer_are_no_words() -> None:
    words = AskedWords(SPELLING, torch.tensor([2, 500, -1]))
    assert words.of(torch.tensor([[3, 10, 11, 49_000, -1]])).tolist() == [[2, -1, -1, -1, -1]]
    assert words.numbers() == [2]
