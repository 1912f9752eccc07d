from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.evaluation.measures.passkey import answer_is_found, shared_memories, split_prompt, wilson
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone

WINDOW = 8


@dataclasses.dataclass
class Example:
    prompt_ids: list[int]
    answer_ids: list[int]
    depth: float = 0.5
    number: int = 0


@pytest.fixture(scope="module")
def lm() -> MemoryLM:
    config = MemoryConfig(memory_layers=[1, 3], window=WINDOW, top_k=8, skip_window_start=1)
    return attach_memory(load_backbone("tiny-random-llama"), config)


@pytest.mark.parametrize(("right", "trials"), [(0, 3), (3, 3), (1, 3), (50, 100)])
def test_wilson_holds_the_rate(right: int, trials: int) -> None:
    low, high = wilson(right, trials)
    assert 0 <= low <= right / trials <= high <= 1
    assert high - low > 0


def test_wilson_agrees_with_a_known_value() -> None:
    # 50 of 100: (0.404, 0.596), as in textbooks.
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("length", [3, 9, 10, 11, 30])
@pytest.mark.parametrize("local", [1, 10])
def test_split_keeps_every_token_and_room_for_the_answer(length: int, local: int) -> None:
    example = Example(list(range(length)), [100, 101, 102])
    stored, kept = split_prompt(example, local)  # type: ignore[arg-type]
    assert stored + kept == [*range(length), 100, 101]
    assert len(kept) == min(length + 2, max(local, 3))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_shared_memories_equal_separate_ones(lm: MemoryLM, data: st.DataObject) -> None:
    base = data.draw(st.lists(st.integers(3, 20), min_size=40, max_size=40))
    prefixes = []
    for _ in range(data.draw(st.integers(1, 5))):
        prefix = base[: data.draw(st.integers(0, 40))]
        for place in data.draw(st.lists(st.integers(0, 39), max_size=1)):
            prefix = [*prefix[:place], 99, *prefix[place + 1 :]][: len(prefix)]
        prefixes.append(prefix)
    done: list[int] = []
    seen = []
    for place, memory in shared_memories(lm, prefixes, "exact", done.append):
        alone = lm.new_memory(1)
        if prefixes[place]:
            lm.ingest(torch.tensor([prefixes[place]]), memory=alone)
        assert memory.lengths.tolist() == alone.lengths.tolist()
        for number, layer in memory.layers.items():
            torch.testing.assert_close(layer.keys, alone.layers[number].keys, rtol=1e-5, atol=1e-5)
        seen.append(place)
        # The caller may change what it is given.
        lm.ingest(torch.tensor([[5] * WINDOW]), memory=memory)
    assert sorted(seen) == list(range(len(prefixes)))
    assert sum(done) == sum(map(len, prefixes))


def test_common_windows_are_read_once(lm: MemoryLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    ingest = lm.ingest
    monkeypatch.setattr(lm, "ingest", lambda ids, **kwargs: (read.append(ids.shape[1]), ingest(ids, **kwargs))[1])
    filler = [7] * 40
    prefixes = [filler, [*filler[:18], 9, *filler[19:]], [*filler[:30], 9, *filler[31:]]]
    list(shared_memories(lm, prefixes, "exact"))
    assert sum(read) == 40 + 24 + 16


def test_each_window_that_is_read_is_told(lm: MemoryLM) -> None:
    """A prompt of 100,000 tokens takes minutes."""
    done: list[int] = []
    list(shared_memories(lm, [[7] * 40], "exact", done.append))
    assert sum(done) == 40
    assert max(done) <= WINDOW


def test_an_overlap_forbids_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        config = MemoryConfig(window=WINDOW, overlap=2)
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.read: list[int] = []

        def new_memory(self, batch_size: int, retriever: object) -> object:
            return object()

        def ingest(self, ids: torch.Tensor, memory: object, progress: object) -> None:
            self.read.append(ids.shape[1])

    stub = Stub()
    list(shared_memories(stub, [[7] * 40, [7] * 40], "exact"))  # type: ignore[arg-type]
    assert stub.read == [40, 40]


def test_found_is_what_greedy_decoding_gives(lm: MemoryLM) -> None:
    prompt = torch.randint(3, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    memory = lm.ingest(prompt[:, : 30 - 6], memory=lm.new_memory(1))
    local = prompt[0, 30 - 6 :].tolist()
    answer: list[int] = []
    for _ in range(3):
        logits = lm(torch.tensor([local + answer]), memory=memory, logits_to_keep=1).logits
        answer.append(int(logits[0, -1].argmax()))
    right = Example(prompt[0].tolist(), answer)
    assert answer_is_found(lm, right, local + answer[:-1], memory)  # type: ignore[arg-type]
    wrong = Example(prompt[0].tolist(), [*answer[:2], answer[2] + 1])
    assert not answer_is_found(lm, wrong, local + answer[:-1], memory)  # type: ignore[arg-type]
