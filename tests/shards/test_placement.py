"""Who holds which pairs of a row, against a plain list of owners."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fot.shards.placement import Row, emptiest


def row_of(owners: list[int]) -> Row:
    row = Row()
    for owner in owners:
        row = row.plus(owner, 1)
    return row


def owners_of(row: Row) -> list[int]:
    return [shard for shard, count in row.runs for _ in range(count)]


OWNERS = st.lists(st.integers(0, 3), max_size=30)


@given(OWNERS, st.data())
def test_every_change_is_that_of_a_list(owners: list[int], data: st.DataObject) -> None:
    row = row_of(owners)
    assert owners_of(row) == owners
    assert row.length == len(owners)
    assert [row.held(shard) for shard in range(4)] == [owners.count(shard) for shard in range(4)]
    count = data.draw(st.integers(0, len(owners)))
    left, gone = row.drop_oldest(count)
    assert owners_of(left) == owners[count:]
    assert {shard: n for shard, n in gone.items() if n} == {s: owners[:count].count(s) for s in owners[:count]}
    mask = data.draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners)))
    kept, masks = row.keep(torch.tensor(mask, dtype=torch.bool))
    assert owners_of(kept) == [owner for owner, keeps in zip(owners, mask, strict=True) if keeps]
    for shard, own in masks.items():
        assert own.tolist() == [keeps for owner, keeps in zip(owners, mask, strict=True) if owner == shard]


@given(OWNERS.filter(bool))
def test_numbers_go_there_and_back(owners: list[int]) -> None:
    row = row_of(owners)
    numbers = torch.arange(len(owners))
    shards, local = row.places(numbers)
    assert shards.tolist() == owners
    assert local.tolist() == [owners[:place].count(owner) for place, owner in enumerate(owners)]
    for shard in set(owners):
        mine = shards == shard
        assert row.numbers(shard, local[mine]).tolist() == numbers[mine].tolist()
        assert row.numbers(shard, torch.tensor([-1])).tolist() == [-1]


def test_new_pairs_go_where_most_room_is() -> None:
    rows = [row_of([0, 0, 1]), row_of([2, 1, 1])]
    assert emptiest(rows, 3) == 2
    assert emptiest(rows, 4) == 3
