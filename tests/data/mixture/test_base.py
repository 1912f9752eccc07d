from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.config.data import IGNORED
from lightning_fot.data.mixture.base import Mixture, MixtureSource
from lightning_fot.data.rows.plan import BatchSequence, Epoch, RowPlan
from lightning_fot.data.rows.sequences import TextSequence, TokenSequence
from lightning_fot.errors import SettingError

PAD = 0
ROOM = 1000  # ids of a document: source and document in the thousands, place below


class Numbered(MixtureSource):
    """Documents whose ids tell source, document and place."""

    def __init__(self, number: int, lengths: list[int], weight: float = 1.0, passes: int | None = None) -> None:
        super().__init__(f"data.sources[{number}]", weight, passes)
        self.number = number
        self.lengths = lengths

    def documents(self, number: int) -> Iterator[TokenSequence]:
        order = np.random.default_rng(number).permutation(len(self.lengths)).tolist()
        for one in order:
            first = (self.number * 100 + one + 1) * ROOM
            key: Hashable = (self.number, one)
            yield TextSequence(np.arange(first, first + self.lengths[one], dtype=np.int32), keys=frozenset({key}))

    def heldout(self) -> Iterator[TokenSequence]:
        return iter(())

    @property
    def mark(self) -> object:
        return self.lengths


def sources_of(many: list[list[int]], weights: list[float], passes: int | None) -> list[MixtureSource]:
    return [Numbered(n, lengths, weights[n], passes) for n, lengths in enumerate(many)]


def batches(sources: list[MixtureSource], plan: RowPlan, limit: int = 10**6) -> list[dict[str, Any]]:
    epoch = Epoch(Mixture(sources, plan.step), plan)
    made = []
    while not epoch.done and len(made) < limit:
        made.append(epoch.next())
    return made


def documents_of(ids: np.ndarray) -> set[int]:
    return {int(token) // ROOM for token in ids.ravel() if token != PAD}


mixtures = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=6), min_size=1, max_size=3)
weights = st.lists(st.floats(0.1, 10), min_size=3, max_size=3)
plans = st.builds(
    lambda streams, pack, window, previous: RowPlan(streams * (1 if previous else pack), window, 1, previous)
    if previous
    else RowPlan(streams * pack, window, pack),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2),
)  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(mixtures, weights, plans, st.integers(1, 3))
def test_every_document_is_read_once_a_pass_from_its_first_token_to_its_last(
    many: list[list[int]], weights: list[float], plan: RowPlan, passes: int
) -> None:
    made = batches(sources_of(many, weights, passes), plan)
    predicted: Counter[int] = Counter()
    for batch in made:
        predicted.update(batch["targets"][batch["targets"] != IGNORED].tolist())
    expected: Counter[int] = Counter()
    for number, lengths in enumerate(many):
        for one, length in enumerate(lengths):
            first = (number * 100 + one + 1) * ROOM
            expected.update(dict.fromkeys(range(first + 1, first + length), passes))
    assert predicted == expected
    for stream in range(plan.streams):
        ids = [int(t) for batch in made for t in batch["input_ids"].reshape(plan.streams, plan.step)[stream] if t]
        for before, after in itertools.pairwise(ids):
            # On to the next token, or to another document's first.
            assert after in (before + 1, after // ROOM * ROOM)


@settings(deadline=None, max_examples=150)
@given(mixtures, weights, plans)
def test_no_document_is_in_the_rows_of_two_streams(many: list[list[int]], weights: list[float], plan: RowPlan) -> None:
    for batch in batches(sources_of(many, weights, None), plan, limit=30):
        rows = batch["input_ids"].reshape(plan.streams, plan.step)
        if plan.previous:
            rows = np.concatenate([batch["previous_ids"].reshape(plan.streams, -1), rows], axis=1)
        seen = [documents_of(row) for row in rows]
        assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(mixtures, weights, plans, st.integers(0, 40), st.sampled_from([None, 1, 2]))
def test_skipping_equals_reading(
    many: list[list[int]], weights: list[float], plan: RowPlan, count: int, passes: int | None
) -> None:
    made = batches(sources_of(many, weights, passes), plan, limit=45)
    epoch = Epoch(Mixture(sources_of(many, weights, passes), plan.step), plan)
    assert epoch.skip(count) == min(count, len(made))
    for batch in made[count:]:
        again = epoch.next()
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 2], [25, 10, 2]])
def test_tokens_keep_to_the_weights_whatever_the_lengths(weights: list[float], pack: int) -> None:
    many = [[900, 700, 800, 990] * 4, [30] * 50, [200, 5] * 20][: len(weights)]
    plan = RowPlan(8 * pack, 10, pack)
    read: Counter[int] = Counter()
    for batch in batches(sources_of(many, weights, None), plan, limit=1200 // pack):
        read.update(int(token) // ROOM // 100 for token in batch["input_ids"].ravel() if token != PAD)
    for number, weight in enumerate(weights):
        share = read[number] / read.total()
        assert abs(share - weight / sum(weights)) < 0.02


def test_shares_hold_from_the_first_batch_on() -> None:
    (batch, *_) = batches(sources_of([[900] * 9, [900] * 9], [3, 1], None), RowPlan(8, 10), limit=1)
    assert Counter(int(row[0]) // ROOM // 100 for row in batch["input_ids"]) == {0: 6, 1: 2}


def test_a_source_with_too_few_documents_gives_way() -> None:
    made = batches(sources_of([[500], [60] * 9], [9, 1], None), RowPlan(4, 10), limit=60)
    assert all((batch["input_ids"] != PAD).all() for batch in made)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_their_rows_of_the_whole_batch(world_size: int) -> None:
    many, plan = [[50, 70, 90, 30], [20] * 9], RowPlan(8, 7, pack=2)

    def sequence(rank: int, ranks: int) -> BatchSequence:
        return BatchSequence(lambda _: Mixture(sources_of(many, [2, 1], None), plan.step), plan, rank, ranks)

    whole, parts = sequence(0, 1), [sequence(rank, world_size) for rank in range(world_size)]
    for _ in range(40):
        batch, shards = whole.next(), [part.next() for part in parts]
        for name, values in batch.items():
            assert np.array_equal(values, np.concatenate([shard[name] for shard in shards]))
    for part in parts:
        part.seek(3)
    whole.seek(3)
    batch = whole.next()
    assert np.array_equal(batch["targets"], np.concatenate([part.next()["targets"] for part in parts]))


def test_a_source_without_documents_is_named() -> None:
    with pytest.raises(SettingError, match=r"data\.sources\[1\].*has no document that is long enough"):
        batches(sources_of([[9], [1]], [1, 1], None), RowPlan(2, 4), limit=3)
