"""The token log against a naive model that keeps one Python list entry a token and a pair."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.memory.token_log import CONTEXT_TOKENS, TokenLog, TokensRead


@dataclass
class NaiveText:
    name: str | None
    ids: list[int] = field(default_factory=list)


@dataclass
class NaiveRow:
    texts: list[NaiveText] = field(default_factory=list)
    current: NaiveText | None = None
    pairs: list[tuple[NaiveText, int]] = field(default_factory=list)
    seen: int = 0

    def begin(self, name: str | None) -> None:
        known = [text for text in self.texts if name is not None and text.name == name]
        if not known:
            known = [NaiveText(name)]
            self.texts.append(known[0])
        self.current = known[0]

    def log(self, ids: list[int], stored: list[bool]) -> None:
        if ids and self.current is None:
            self.begin(None)
        for token, kept in zip(ids, stored, strict=True):
            assert self.current is not None
            if kept:
                self.pairs.append((self.current, len(self.current.ids)))
            self.current.ids.append(token)

    def keep(self, mask: list[bool]) -> None:
        if all(mask):
            return
        self.pairs = [pair for pair, kept in zip(self.pairs, mask, strict=True) if kept]
        alive = [id(text) for text, _ in self.pairs] + [id(self.current)]
        self.texts = [text for text in self.texts if id(text) in alive]


def copied(row: NaiveRow) -> NaiveRow:
    new = {id(text): NaiveText(text.name, list(text.ids)) for text in [*row.texts]}
    current = None if row.current is None else new[id(row.current)]
    return NaiveRow(list(new.values()), current, [(new[id(text)], place) for text, place in row.pairs], row.seen)


def check(log: TokenLog, rows: list[NaiveRow]) -> None:
    assert log.seen.tolist() == [row.seen for row in rows]
    assert log.lengths.tolist() == [len(row.pairs) for row in rows]
    documents = {document.number: document for document in log.documents}
    assert len(documents) == len(log.documents) == sum(len(row.texts) for row in rows)
    for index, row in enumerate(rows):
        own = [document for document in log.documents if document.row == index]
        assert [(document.name, document.tokens) for document in own] == [
            (text.name, len(text.ids)) for text in row.texts
        ]
        numbers, places = log.locate(index, torch.arange(len(row.pairs)))
        assert places.tolist() == [place for _, place in row.pairs]
        by_text = {id(text): document for text, document in zip(row.texts, own, strict=True)}
        assert numbers.tolist() == [by_text[id(text)].number for text, _ in row.pairs]
        for text, document in zip(row.texts, own, strict=True):
            held = [place for place, (of, _) in enumerate(row.pairs) if of is text]
            assert log.rows_of(document.number).tolist() == held
            assert document.stored == len(held)
            assert log.document(document.number) == document
            # Only tokens far before the first pair may be gone, and all that are kept are right.
            first = min((row.pairs[place][1] for place in held), default=len(text.ids))
            assert document.first <= max(0, first - CONTEXT_TOKENS)
            assert log.tokens(document.number, 0, 10**9).tolist() == text.ids[document.first :]
            assert (
                log.tokens(document.number, document.first + 1, len(text.ids) - 1).tolist()
                == (text.ids[document.first + 1 : -1])
            )


def step(log: TokenLog, rows: list[NaiveRow], draw: random.Random, skip: bool = True) -> None:
    kind = draw.choice(["begin", "end", "extend", "extend", "extend", "keep"] + ["skip"] * skip)
    if kind == "begin":
        names = [draw.choice([None, "a", "b", "c"]) for _ in rows]
        log.begin(names)
        for row, name in zip(rows, names, strict=True):
            row.begin(name)
    elif kind == "end":
        log.end()
        for row in rows:
            row.current = None
    elif kind == "extend":
        width = draw.randint(0, 9)
        ids = [[draw.randrange(1000) for _ in range(width)] for _ in rows]
        valid = [[draw.random() < 0.8 for _ in range(width)] for _ in rows]
        stored = [[one and draw.random() < 0.7 for one in row] for row in valid]
        shape = (len(rows), width)
        log.extend(
            TokensRead(
                torch.tensor(ids, dtype=torch.int64).reshape(shape),
                torch.tensor(valid, dtype=torch.bool).reshape(shape),
                torch.tensor(stored, dtype=torch.bool).reshape(shape),
            )
        )
        for row, a, b, c in zip(rows, ids, valid, stored, strict=True):
            row.log([x for x, y in zip(a, b, strict=True) if y], [x for x, y in zip(c, b, strict=True) if y])
            row.seen += sum(b)
    elif kind == "skip":
        counts = [draw.randint(0, 3) for _ in rows]
        log.skip(torch.tensor(counts))
        for row, count in zip(rows, counts, strict=True):
            if count and row.current is not None and row.current.name is not None:
                row.current = None
            row.log([-1] * count, [True] * count)
    else:
        masks = [[draw.random() < 0.8 for _ in row.pairs] for row in rows]
        log.keep([torch.tensor(mask, dtype=torch.bool) for mask in masks])
        for row, mask in zip(rows, masks, strict=True):
            row.keep(mask)


def restored(log: TokenLog) -> TokenLog:
    tensors, documents = log.state()
    return TokenLog.restore(
        {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(documents))
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_any_sequence_of_steps_equals_the_naive_log(seed: int, batch: int) -> None:
    draw = random.Random(seed)
    log, rows = TokenLog(batch), [NaiveRow() for _ in range(batch)]
    for number in range(20):
        step(log, rows, draw)
        if number % 7 == 3:
            log = restored(log)
        if number == 9:
            chosen = [draw.randrange(len(rows)) for _ in range(draw.randint(1, 3))]
            log, rows = log.select_rows(torch.tensor(chosen)), [copied(rows[row]) for row in chosen]
        check(log, rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_a_fork_and_its_origin_do_not_see_each_other(seed: int) -> None:
    draw = random.Random(seed)
    log, rows = TokenLog(2), [NaiveRow(), NaiveRow()]
    for _ in range(8):
        step(log, rows, draw)
    other, other_rows = log.fork(), [copied(row) for row in rows]
    for _ in range(8):
        step(log, rows, draw)
        step(other, other_rows, draw)
        check(log, rows)
        check(other, other_rows)


def test_a_capped_log_does_not_grow() -> None:
    log = TokenLog(1)
    for number in range(40):
        log.begin([f"document {number // 4}"])
        everything = torch.ones(1, 500, dtype=torch.bool)
        log.extend(TokensRead(torch.arange(500)[None], everything, everything))
        mask = torch.arange(int(log.lengths)) >= int(log.lengths) - 800
        log.keep([mask])
    assert log.nbytes <= 4 * (3 * 800 + CONTEXT_TOKENS)
    assert [document.name for document in log.documents] == ["document 9"]
    assert log.documents[0].tokens == 2000
    assert log.documents[0].first == 2000 - 800 - CONTEXT_TOKENS
    assert log.seen.tolist() == [20_000]
    assert len(restored(log).documents) == 1


def test_a_document_that_is_read_again_goes_on_and_an_ended_one_is_left() -> None:
    log = TokenLog(1)
    yes = torch.ones(1, 2, dtype=torch.bool)
    for names in (["a"], ["b"], ["a"], None):
        log.end() if names is None else log.begin(names)
        log.extend(TokensRead(torch.tensor([[1, 2]]), yes, yes))
    assert [(document.name, document.tokens) for document in log.documents] == [("a", 4), ("b", 2), (None, 2)]
    assert log.rows_of(log.find("a")[0].number).tolist() == [0, 1, 4, 5]
    assert not log.find("c")


def test_wrong_use_is_told() -> None:
    log = TokenLog(2)
    with pytest.raises(ValueError, match="1 document names for 2 rows"):
        log.begin(["a"])
    with pytest.raises(KeyError):
        log.tokens(0, 0, 1)
    tensors, documents = log.state()
    broken: dict[str, Any] = {**tensors, "tokens": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match="more or fewer"):
        TokenLog.restore(broken, documents)
