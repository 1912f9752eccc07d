from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.config.data import IGNORED
from lightning_fot.data.rows.plan import BatchSequence, Epoch, RowPlan
from lightning_fot.data.text.tokens import Ids

PAD = 0


def numbered(lengths: list[int]) -> list[Ids]:
    """Documents whose tokens are all different, in the order of the documents."""
    ends = np.cumsum(lengths).tolist()
    return [np.arange(end - length + 1, end + 1, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]


def batches(documents: list[Ids], plan: RowPlan) -> list[dict[str, Any]]:
    epoch = Epoch(iter(documents), plan)
    made = []
    while not epoch.done:
        made.append(epoch.next())
    return made


def streams_of(made: list[dict[str, Any]], plan: RowPlan, name: str) -> list[list[int]]:
    """What each stream read, batch after batch."""
    return [
        [int(token) for batch in made for token in batch[name].reshape(plan.streams, plan.step)[stream]]
        for stream in range(plan.streams)
    ]


corpora = st.lists(st.integers(2, 40), min_size=1, max_size=12)
plans = st.builds(
    lambda streams, pack, window: RowPlan(streams * pack, window, pack),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 9),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(corpora, plans)
def test_every_token_is_read_once_and_predicted_once(lengths: list[int], plan: RowPlan) -> None:
    documents = numbered(lengths)
    made = batches(documents, plan)
    read = [token for stream in streams_of(made, plan, "input_ids") for token in stream if token != PAD]
    predicted = [token for stream in streams_of(made, plan, "targets") for token in stream if token != IGNORED]
    firsts = {int(document[0]) for document in documents}
    everything = set(range(1, sum(lengths) + 1))
    assert sorted(predicted) == sorted(everything - firsts)
    assert len(read) == len(set(read))
    # A document's last token predicts nothing; only such tokens may stay unread, at the very end of the pass.
    assert everything - set(read) <= {int(document[-1]) for document in documents}


@settings(deadline=None, max_examples=100)
@given(corpora, plans)
def test_streams_read_whole_documents_in_order(lengths: list[int], plan: RowPlan) -> None:
    documents = {int(document[0]): document.tolist() for document in numbered(lengths)}
    made = batches(list(numbered(lengths)), plan)
    for inputs, targets in zip(streams_of(made, plan, "input_ids"), streams_of(made, plan, "targets"), strict=True):
        expected: list[int] = []
        expected_targets: list[int] = []
        for token in inputs:
            if token in documents:
                expected += documents[token]
                expected_targets += [*documents[token][1:], IGNORED]
        length = len(inputs)
        assert inputs == (expected + [PAD] * length)[:length]
        assert targets == (expected_targets + [IGNORED] * length)[:length]


@settings(deadline=None, max_examples=100)
@given(corpora, plans, st.integers(0, 3), st.data())
def test_skipping_equals_reading(lengths: list[int], plan: RowPlan, previous: int, data: st.DataObject) -> None:
    if previous:
        plan = RowPlan(plan.streams, plan.window, 1, previous)
    made = batches(numbered(lengths), plan)
    count = data.draw(st.integers(0, len(made) + 2))
    epoch = Epoch(iter(numbered(lengths)), plan)
    assert epoch.skip(count) == min(count, len(made))
    for batch in made[count:]:
        again = epoch.next()
        assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert epoch.done


def test_packed_rows_are_consecutive_windows_and_the_next_batch_goes_on() -> None:
    first, second = batches(numbered([16, 16]), RowPlan(4, 4, pack=2))
    assert first["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [17, 18, 19, 20], [21, 22, 23, 24]]
    assert first["targets"][1].tolist() == [6, 7, 8, 9]
    assert second["input_ids"][0].tolist() == [9, 10, 11, 12]
    assert second["targets"][1].tolist() == [14, 15, 16, IGNORED]


def test_the_next_document_starts_in_mid_row() -> None:
    (batch, *_) = batches(numbered([3, 9]), RowPlan(1, 8))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[2, 3, IGNORED, 5, 6, 7, 8, 9]]


def test_paper_rows_bring_the_windows_before() -> None:
    made = batches(numbered([12, 12]), RowPlan(2, 3, previous=2, pad_id=PAD))
    assert made[0]["previous_ids"].shape == (2, 2, 3)
    assert made[0]["previous_valid"].tolist() == [[False, False], [False, False]]
    assert made[1]["previous_valid"].tolist() == [[False, True], [False, True]]
    assert made[2]["previous_ids"].tolist() == [[[1, 2, 3], [4, 5, 6]], [[13, 14, 15], [16, 17, 18]]]
    assert made[2]["previous_valid"].all()
    assert made[2]["input_ids"].tolist() == [[7, 8, 9], [19, 20, 21]]


def test_every_batch_has_a_target() -> None:
    for lengths in ([9], [8], [4, 4, 4, 5], [2, 2]):
        for batch in batches(numbered(lengths), RowPlan(2, 4)):
            assert (batch["targets"] != IGNORED).any()


def sequence(rank: int = 0, world_size: int = 1, previous: int = 0) -> BatchSequence:
    def open_epoch(epoch: int) -> Iterator[Ids]:
        return iter(numbered([30, 11, 23, 7, 19, 40])[:: -1 if epoch % 2 else 1])

    pack = 1 if previous else 2
    return BatchSequence(open_epoch, RowPlan(8, 5, pack, previous), rank, world_size)


@pytest.mark.parametrize("previous", [0, 2])
def test_batch_t_is_the_same_wherever_one_comes_from(previous: int) -> None:
    straight = sequence(previous=previous)
    made = [straight.next() for _ in range(20)]
    assert straight.epoch_number > 1
    jumping = sequence(previous=previous)
    for number in (7, 3, 19, 0, 12, 13, 5):
        jumping.seek(number)
        again = jumping.next()
        assert all(np.array_equal(made[number][name], again[name]) for name in made[number])


def test_ranks_share_the_rows() -> None:
    whole, halves = sequence(), [sequence(rank, 2) for rank in range(2)]
    for _ in range(15):
        expected = whole.next()
        parts = [half.next() for half in halves]
        assert np.array_equal(expected["input_ids"], np.concatenate([part["input_ids"] for part in parts]))
        read = [set(part["input_ids"][part["input_ids"] != PAD].tolist()) for part in parts]
        assert not read[0] & read[1]


def test_no_documents_at_all_end_instead_of_hanging() -> None:
    empty = BatchSequence(lambda epoch: iter(()), RowPlan(1, 4))
    empty.seek(3)
    with pytest.raises(StopIteration):
        empty.next()
