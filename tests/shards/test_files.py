"""Every shard writes its own files; any number of shards, or none, reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot.errors import SettingError
from lightning_fot.memory import Memory
from lightning_fot.memory.on_disk import load_memory
from tests.support import shards
from tests.support.shards import OTHERS, SHARDS, contents, new_memory, read_text

MADE = {"made": 1, "score_factor": 1.0}


def filled(given: Any, dtype: torch.dtype, capacity: int | None = None) -> Memory:
    where = None if given is None else shards.place(given)
    memory = new_memory(where, shards.shape(dtype), 2, capacity=capacity)
    for seed, counts in enumerate(([9, 4], [0, 7], [16, 16], [5, 5], [12, 3])):
        read_text(memory, counts, seed, f"text {seed}")
    memory.forget("text 2")
    return memory


def loaded(given: Any, dtype: torch.dtype, folder: Path) -> Memory:
    where = None if given is None else shards.place(given)
    return load_memory(folder, lambda written: MADE, lambda rows: new_memory(where, shards.shape(dtype), rows))


def assert_same(own: Memory, other: Memory, exactly: bool = True) -> None:
    close = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 0.05, "rtol": 0.02}
    assert own.lengths.tolist() == other.lengths.tolist()
    assert own.documents == other.documents
    for number, layer in own.layers.items():
        for mine, theirs in zip(contents(layer), contents(other.layers[number]), strict=True):
            for got, want in zip(mine, theirs, strict=True):
                torch.testing.assert_close(got, want, **close)
    queries = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    for number, layer in own.layers.items():
        if exactly:
            assert torch.equal(layer.search(queries, 5), other.layers[number].search(queries, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    ("writer", "reader"),
    [(SHARDS, SHARDS), (SHARDS, OTHERS), (SHARDS, None), (None, SHARDS), (OTHERS, SHARDS)],
)
def test_any_number_reads_what_any_number_wrote(
    cluster: Any, tmp_path: Path, writer: Any, reader: Any, dtype: torch.dtype
) -> None:
    memory = filled(writer, dtype)
    memory.save(tmp_path)
    again = loaded(reader, dtype, tmp_path)
    # Eight bits: other slices are coded otherwise.
    exactly = dtype != torch.int8 or writer == reader
    assert_same(again, memory, exactly)
    for one in (memory, again):
        read_text(one, [3, 8], 11, "more")
        one.save(tmp_path)
        assert_same(loaded(None, dtype, tmp_path), one, dtype != torch.int8)


def test_only_what_is_new_is_written(cluster: Any, tmp_path: Path) -> None:
    memory = filled(SHARDS, torch.float32)
    memory.save(tmp_path)
    before = {file.name for file in tmp_path.glob("memory-*")}
    # The third shard held what was forgotten.
    assert len(before) == 2
    read_text(memory, [4, 4], 20)
    memory.save(tmp_path)
    after = {file.name for file in tmp_path.glob("memory-*")}
    # New pairs went to one shard.
    assert len(after - before) == 1
    assert before < after
    assert_same(loaded(SHARDS, torch.float32, tmp_path), memory)


def test_dropped_pairs_are_not_in_the_files(cluster: Any, tmp_path: Path) -> None:
    memory = filled(SHARDS, torch.float32, capacity=30)
    for seed in range(30, 36):
        read_text(memory, [11, 6], seed)
    memory.save(tmp_path)
    assert_same(loaded(OTHERS, torch.float32, tmp_path), memory)


def test_files_that_are_missing_or_altered_are_told(cluster: Any, tmp_path: Path) -> None:
    filled(SHARDS, torch.float32).save(tmp_path)
    index = json.loads((tmp_path / "memory.json").read_text())
    file = tmp_path / index["pairs"][1]["file"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for given in (None, SHARDS, OTHERS):
        with pytest.raises(SettingError, match=rf"damaged: {file.name} is missing, cut short or altered"):
            loaded(given, torch.float32, tmp_path)
