"""What must hold of memory and retrieval whatever was stored: against brute force and plain Python lists."""

import random

import pytest
import torch

from lightning_fot import attach_memory
from tests.support.models import WINDOW, settings, tiny_llama, tokens

LAYERS = [1, 3]
# Each approximate index at a setting at which it looks at everything.
EXHAUSTIVE = {
    "exact": {},
    "faiss_ivf": {"nlist": 4, "nprobe": 4},
    "hnsw": {"M": 48, "ef_construction": 200, "ef_search": 500, "num_threads": 1},
    "scann": {"num_leaves": 4, "num_leaves_to_search": 1000, "reorder": 5000},
}
every_backend = pytest.mark.parametrize("name", EXHAUSTIVE)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def exhaustive(name):
    """An index from 64 keys on."""
    return {"name": name, "min_index_size": 64, **EXHAUSTIVE[name]}


def used(memory, name):
    """Whether an index answered, and none failed."""
    retrievers = [layer.retriever for layer in memory.layers.values()]
    failed = sum(retriever.stats().fallbacks for retriever in retrievers)
    return failed == 0 and (name == "exact" or all(int(part.indexed.min()) >= 64 for part in retrievers))


@every_backend
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_neighbours_are_those_of_the_raw_inner_product(name, kv_heads):
    """Keys whose norms differ a hundredfold: neither cosine nor distance would find the same."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, kv_heads, 300, 16, generator=generator)
    keys *= 10 ** (2 * torch.rand(2, kv_heads, 300, 1, generator=generator))
    queries = torch.randn(2, kv_heads, 9, 16, generator=generator)
    with attach_memory(tiny_llama(kv_heads), settings(retriever=exhaustive(name))) as lm:
        memory = lm.new_memory(2)
        memory.append(dict.fromkeys(LAYERS, (keys, keys)))
        memory.flush()
        found = memory.layers[3].search(queries, 10)
        assert used(memory, name)
    products = queries.double() @ keys.double().mT
    assert torch.equal(found.sort(-1).values, products.topk(10).indices.sort(-1).values)
    by_cosine = (products / keys.double().norm(dim=-1)[:, :, None]).topk(10).indices
    assert not torch.equal(found.sort(-1).values, by_cosine.sort(-1).values)


@every_backend
@pytest.mark.parametrize(
    ("kv_heads", "positions", "dtype", "flushed"),
    [(2, "first", torch.float32, True), (4, "none", torch.float32, False), (2, "none", torch.bfloat16, True)],
)
def test_backends_are_interchangeable(name, kv_heads, positions, dtype, flushed):
    """At its exhaustive setting every index, with and without a tail that it does not cover yet, gives the set that
    exact search gives, and so the same logits."""
    ids, question = tokens(1, 400), tokens(1, 12, seed=1)
    model = tiny_llama(kv_heads).to(dtype)
    with attach_memory(model, settings(positions=positions, top_k=16, retriever="exact")) as lm:
        memory = lm.ingest(ids, lm.new_memory())
        expected = lm(question, memory=memory).logits
        with lm.record_queries() as recorded:
            lm(question, memory=memory)
        other = lm.new_memory(retriever=exhaustive(name))
        for start in range(0, 400, 100):
            part = slice(start, start + 100)
            other.append({n: (held.keys[:, :, part], held.values[:, :, part]) for n, held in memory.layers.items()})
            if flushed or start == 200:
                # Indexes are built beside the caller; what comes after this waits in the tail.
                other.flush()
        for layer in LAYERS:
            queries = recorded[layer][0].unflatten(0, (1, kv_heads))
            rows, wanted = (m.layers[layer].search(queries, 16) for m in (other, memory))
            assert torch.equal(rows.sort(-1).values, wanted.sort(-1).values)
        logits = lm(question, memory=other).logits
        assert used(other, name)
    torch.testing.assert_close(logits, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


class NaiveMemory:
    """Rows of (keys, values), one entry a token: (G, D) each, the same in every layer."""

    def __init__(self, capacity, rows=2):
        self.capacity = capacity
        self.rows = [[] for _ in range(rows)]

    def append(self, keys, values, lengths):
        for row, held in enumerate(self.rows):
            held += [(keys[row, :, n], values[row, :, n]) for n in range(int(lengths[row]))]
            if self.capacity is not None:
                del held[: max(0, len(held) - self.capacity)]

    def copy(self):
        other = NaiveMemory(self.capacity)
        other.rows = [list(held) for held in self.rows]
        return other


def assert_same(memory, naive, generator, exact):
    """Contents, and that every number that a search returns leads to the pair it was asked about."""
    assert memory.lengths.tolist() == [len(held) for held in naive.rows]
    queries = torch.randn(2, 2, 2, 16, generator=generator)
    for layer in memory.layers.values():
        rows = layer.search(queries, 5)
        found = layer.gather(rows)
        assert torch.equal(found.valid, rows >= 0)
        for row, held in enumerate(naive.rows):
            if held:
                keys, values = (torch.stack(part, dim=1) for part in zip(*held, strict=True))
                assert torch.equal(layer.keys[row, :, : len(held)], keys)
                assert torch.equal(layer.values[row, :, : len(held)], values)
            for head in range(2):
                for place in range(2):
                    numbers = [n for n in rows[row, head, place].tolist() if n >= 0]
                    assert len(numbers) == len(set(numbers)) == min(5, len(held))
                    for rank, number in enumerate(numbers):
                        assert torch.equal(found.keys[row, head, place, rank], held[number][0][head])
                        assert torch.equal(found.values[row, head, place, rank], held[number][1][head])
                    if exact and held:
                        products = keys[head].double() @ queries[row, head, place].double()
                        assert set(numbers) == set(products.topk(min(5, len(held))).indices.tolist())


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_lead_to_their_pairs_after_any_history(name, capacity, seed, tmp_path):
    """Random histories of adding, falling out, forgetting all, branching, choosing rows, saving and loading."""
    choices = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    config = settings(capacity=capacity, retriever=exhaustive(name))
    with attach_memory(tiny_llama(), config) as lm:
        memory, naive, branches = lm.new_memory(2), NaiveMemory(capacity), []
        kinds = ["append"] * 8 + ["reset", "snapshot", "snapshot", "select", "save", "save", "flush"]
        for step in range(24):
            kind = choices.choice(kinds)
            if kind == "append":
                width = choices.choice([1, 7, 40, 90])
                keys, values = (torch.randn(2, 2, width, 16, generator=generator) for _ in range(2))
                lengths = torch.tensor([choices.randint(0, width), width])
                memory.append(dict.fromkeys(LAYERS, (keys, values)), lengths)
                naive.append(keys, values, lengths)
            elif kind == "reset":
                memory.reset()
                naive = NaiveMemory(capacity)
            elif kind == "snapshot":
                branches.append((memory, naive))
                memory, naive = memory.snapshot(), naive.copy()
            elif kind == "select":
                order = choices.choice([[1, 0], [0, 0], [1, 1]])
                branches.append((memory, naive))
                memory, rows = memory.select_rows(torch.tensor(order)), naive.copy().rows
                naive = naive.copy()
                naive.rows = [list(rows[row]) for row in order]
            elif kind == "save":
                folder = tmp_path / f"memory-{choices.randint(0, 1)}"
                memory.save(folder)
                branches.append((memory, naive))
                memory, naive = lm.load_memory(folder), naive.copy()
            else:
                memory.flush()
            if step % 8 == 7:
                assert_same(memory, naive, generator, name == "exact")
        for branch, expected in [*branches, (memory, naive)]:
            assert_same(branch, expected, generator, name == "exact")
        assert sum(part.retriever.stats().fallbacks for part in memory.layers.values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mean", "largest"), [("float32", 0, 0), ("bfloat16", 5e-2, 0.25), ("int8", 5e-2, 0.5)]
)
@pytest.mark.parametrize(("kv_heads", "positions"), [(2, "first"), (4, "none")])
@pytest.mark.parametrize("overlap", [0, 4])
def test_the_stored_dtype_moves_logits_by_its_rounding(dtype, mean, largest, kv_heads, positions, overlap):
    """fp32 exactly; fewer bytes by at most 0.05 in the mean, on logits that spread by 1.6."""
    ids, model = tokens(1, 4 * WINDOW), tiny_llama(kv_heads)
    logits = []
    for stored in (None, dtype):
        with attach_memory(model, settings(positions=positions, overlap=overlap, dtype=stored)) as lm:
            logits.append(lm(ids).logits)
    difference = (logits[0] - logits[1]).abs()
    assert float(difference.mean()) <= mean
    assert float(difference.max()) <= largest
    # The rounding is there at all.
    assert (float(difference.max()) > 0) == (dtype != "float32")
