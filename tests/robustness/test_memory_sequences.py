"""Any sequence of operations on a memory, against plain lists: pairs, documents, neighbours and files are right."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot.memory import Memory, MemoryShape
from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.memory.on_disk import load_memory
from lightning_fot.memory.token_log import TokenLog, TokensRead

ROWS, HEADS, DIM, LAYERS = 2, 2, 4, (0, 2)
SPECS: dict[str, Any] = {
    "exact": "exact",
    "hnsw": {"name": "hnsw", "min_index_size": 24, "ef_search": 2000, "num_threads": 1, "build": "blocking"},
    "faiss_ivf": {"name": "faiss_ivf", "min_index_size": 48, "nlist": 1, "nprobe": 1, "num_threads": 1},
}


class Failed(Exception):
    """Strikes inside an operation."""


class Beside:
    """A memory and what it must hold: for each row a list of (document, token id, keys and values of each layer)."""

    def __init__(self, spec: Any, dtype: torch.dtype, capacity: int | None, folder: Path) -> None:
        shape = MemoryShape(LAYERS, (HEADS,) * 2, (DIM,) * 2, (DIM,) * 2, dtype, torch.device("cpu"))
        self.new = lambda rows: Memory(shape, rows, spec, capacity, lambda: {"made": 1})
        self.memory: Memory = self.new(ROWS)
        self.rows: list[list[Any]] = [[] for _ in range(ROWS)]
        self.capacity, self.folder, self.eight, self.indexed = capacity, folder, dtype == torch.int8, spec != "exact"

    def copied(self, memory: Memory) -> Beside:
        twin = copy.copy(self)
        twin.memory, twin.rows = memory, [list(row) for row in self.rows]
        return twin

    def append(self, draw: random.Random, failing: bool) -> None:
        count, generator = draw.randint(1, 25), torch.Generator().manual_seed(draw.getrandbits(30))
        lengths = torch.tensor([draw.randint(0, count) for _ in self.rows])
        name = draw.choice(["a", "b", "c"])
        size = 10.0 ** draw.choice([-2, 0, 0, 0, 2])
        repeated = draw.random() < 0.3
        pairs = {}
        for layer in LAYERS:
            each = torch.randn(2, len(self.rows), HEADS, count, DIM, generator=generator) * size
            pairs[layer] = tuple(each[:, :, :, :1].expand_as(each) if repeated else each)
        ids = torch.randint(0, 99, (len(self.rows), count), generator=generator)
        valid = torch.arange(count) < lengths[:, None]
        self.memory.log.begin([name] * len(self.rows))
        if failing:
            strike = draw.choice([(MemoryLayer, "append"), (TokenLog, "extend"), (Memory, "_drop_oldest")])
            self.strikes(strike, draw, lambda: self.memory.append(pairs, lengths, TokensRead(ids, valid, valid)))
            self.memory.log.end()
            return
        self.memory.append(pairs, lengths, TokensRead(ids, valid, valid))
        self.memory.log.end()
        for row, length in enumerate(lengths.tolist()):
            self.rows[row] += [
                (name, int(ids[row, place]), {n: (k[row, :, place], v[row, :, place]) for n, (k, v) in pairs.items()})
                for place in range(length)
            ]
            if self.capacity is not None:
                self.rows[row] = self.rows[row][-self.capacity :]

    def strikes(self, strike: tuple[Any, str], draw: random.Random, work: Any) -> None:
        """Does work during which one part fails."""
        owner, name = strike
        # Only a layer's parts are called for each of two layers.
        real, left = getattr(owner, name), [draw.randint(1, 2 if owner is MemoryLayer else 1)]

        def failing(*args: Any, **kw: Any) -> Any:
            done = real(*args, **kw)
            left[0] -= 1
            if not left[0]:
                raise Failed
            return done

        setattr(owner, name, failing)
        try:
            with pytest.raises(Failed):
                work()
        finally:
            setattr(owner, name, real)

    def forget(self, draw: random.Random, failing: bool) -> None:
        named = sorted({name for row in self.rows for name, _, _ in row})
        if not named:
            return
        name = draw.choice(named)
        if failing:
            self.strikes((MemoryLayer, "keep"), draw, lambda: self.memory.forget(name))
            return
        gone = self.memory.forget(name)
        assert gone == sum(name == known for row in self.rows for known, _, _ in row)
        self.rows = [[each for each in row if each[0] != name] for row in self.rows]

    def do(self, draw: random.Random) -> Beside | None:
        """One operation; another memory where it made one."""
        failing = draw.random() < 0.2
        operation = draw.choice(["append"] * 4 + ["forget", "reset", "snapshot", "select", "save", "pickle", "flush"])
        if operation == "append":
            self.append(draw, failing)
        elif operation == "forget":
            self.forget(draw, failing)
        elif operation == "reset" and draw.random() < 0.3:
            self.memory.reset()
            self.rows = [[] for _ in self.rows]
        elif operation == "snapshot":
            return self.copied(draw.choice([Memory.snapshot, copy.deepcopy])(self.memory))
        elif operation == "select":
            order = [draw.randrange(len(self.rows)) for _ in self.rows]
            twin = self.copied(self.memory.select_rows(torch.tensor(order)))
            twin.rows = [list(self.rows[row]) for row in order]
            return twin
        elif operation == "save":
            folder = self.folder / draw.choice("xy")
            self.memory.save(folder)
            return self.copied(load_memory(folder, lambda written: {"made": 1, "score_factor": 1.0}, self.new))
        elif operation == "pickle":
            self.memory.fingerprint = None
            twin = self.copied(pickle.loads(pickle.dumps(self.memory)))
            self.memory.fingerprint = twin.memory.fingerprint = lambda: {"made": 1}
            return twin
        elif operation == "flush":
            self.memory.flush()
        return None

    def check(self, draw: random.Random) -> None:
        memory = self.memory
        assert memory.lengths.tolist() == [len(row) for row in self.rows]
        generator = torch.Generator().manual_seed(draw.getrandbits(30))
        queries = torch.randn(len(self.rows), HEADS, 2, DIM, generator=generator)
        for number, row in enumerate(self.rows):
            documents, places = memory.log.locate(number, torch.arange(len(row)))
            for (name, token, _), document, place in zip(row, documents.tolist(), places.tolist(), strict=True):
                assert memory.log.document(document).name == name
                assert memory.log.tokens(document, place, place + 1).tolist() == [token]
        for index, layer in memory.layers.items():
            keys, values = layer.keys, layer.values
            rows = layer.search(queries, 6) if len(memory) else None
            for number, row in enumerate(self.rows):
                if not row:
                    continue
                stored = (
                    torch.stack([each[index][0] for _, _, each in row], 1),
                    torch.stack([each[index][1] for _, _, each in row], 1),
                )
                for have, want in zip((keys, values), stored, strict=True):
                    limit = 0.06 * float(want.abs().max()) if self.eight else 0.0
                    assert float((have[number, :, : len(row)] - want).abs().max()) <= limit
                assert rows is not None
                scores = queries[number] @ keys[number, :, : len(row)].transpose(1, 2)
                width = min(6, len(row))
                found = scores.gather(2, rows[number, :, :, :width])
                # An index holds keys as they were when it was built; in eight bits they may have been coded anew since.
                slack = 1e-2 if self.eight and self.indexed else 1e-4
                limit = slack * float(scores.abs().max())
                torch.testing.assert_close(found, scores.topk(width).values, atol=limit, rtol=slack)
                assert bool((rows[number, :, :, width:] == -1).all())


def run(spec: Any, dtype: torch.dtype, capacity: int | None, folder: Path, seed: int, steps: int) -> None:
    draw = random.Random(seed)
    memories = [Beside(spec, dtype, capacity, folder)]
    for _ in range(steps):
        twin = draw.choice(memories).do(draw)
        if twin is not None:
            memories.append(twin)
            if len(memories) > 3:
                memories.pop(draw.randrange(len(memories)))
        draw.choice(memories).check(draw)
    for each in memories:
        each.check(draw)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", SPECS)
def test_any_sequence(name: str, dtype: torch.dtype, capacity: int | None, tmp_path: Path) -> None:
    for seed in range(3):
        run(SPECS[name], dtype, capacity, tmp_path / str(seed), seed, 25)


@pytest.mark.robustness_long
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", SPECS)
def test_any_long_sequence(name: str, dtype: torch.dtype, capacity: int | None, tmp_path: Path) -> None:
    for seed in range(1000, 1100):
        run(SPECS[name], dtype, capacity, tmp_path / str(seed), seed, 120)
