"""Threads on one model: each answer is the one that is given alone, each memory what it is alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lightning_fot import attach_memory
from lightning_fot.config import RopeSettings
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.stretch import stretch_positions
from lightning_fot.model.lm import MemoryLM
from lightning_fot.retrievers import create_retriever
from tests.support.models import settings, tiny_llama, tokens

QUESTIONS = [tokens(1, length, seed) for seed, length in enumerate((5, 23, 40, 12), 10)]
DOCUMENTS = [tokens(1, length, seed) for seed, length in enumerate((90, 61), 20)]


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each work gives, in threads of their own that begin at once."""
    start, found = threading.Barrier(len(works)), [None] * len(works)
    errors: list[BaseException] = []

    def run(number: int, work: Callable[[], Any]) -> None:
        try:
            start.wait(60)
            found[number] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def equal(some: Any, other: Any) -> bool:
    if isinstance(some, torch.Tensor):
        return bool(torch.allclose(some, other, atol=1e-5))
    return len(some) == len(other) and all(equal(*pair) for pair in zip(some, other, strict=True))


def pairs(memory: Any) -> list[torch.Tensor]:
    return [tensor for layer in memory.layers.values() for tensor in (layer.keys.clone(), layer.values.clone())]


def asking(lm: MemoryLM, memory: Any) -> list[Callable[[], Any]]:
    """Ways of asking, of which each notes what belongs to it alone."""

    def call(question: torch.Tensor) -> Any:
        with torch.no_grad():
            return lm(question, memory=memory).logits

    def generate(question: torch.Tensor) -> Any:
        return lm.generate(question, memory=memory, max_new_tokens=6, do_sample=False)

    def noted(question: torch.Tensor) -> Any:
        with lm.record_attention() as trace, lm.record_queries() as queries, torch.no_grad():
            lm(question, memory=memory)
        found = [passage.mass for passage in trace.passages(memory, length=16, top=2)]
        return [torch.tensor(found), *(torch.cat(list(each), 1) for each in queries.values())]

    def sharper(question: torch.Tensor) -> Any:
        with lm.attachment.asked_with(2.0), torch.no_grad():
            return lm(question, memory=memory).logits

    return [lambda: call(QUESTIONS[0]), lambda: generate(QUESTIONS[1]), lambda: noted(QUESTIONS[2]),
            lambda: sharper(QUESTIONS[3])]  # fmt: skip


SPECS: list[dict[str, Any]] = [
    {},
    {"overlap": 4, "sink_tokens": 1},
    {"dtype": "int8", "top_k": 8},
    {"retriever": {"name": "faiss_ivf", "min_index_size": 48, "nlist": 1, "nprobe": 1, "num_threads": 1}, "top_k": 8},
]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(change, id=name, marks=[] if name == "index" else pytest.mark.slow)
        for name, change in zip(["plain", "overlap", "int8", "index"], SPECS, strict=True)
    ],
)
def test_each_answer_is_the_one_given_alone(changes: dict[str, Any]) -> None:
    with attach_memory(tiny_llama(), settings(**changes)) as lm:
        known = lm.ingest(tokens(1, 120, 30), lm.new_memory(), document="known")
        asked = asking(lm, known)
        want = [ask() for ask in asked]
        alone = [pairs(lm.ingest(document, lm.new_memory())) for document in DOCUMENTS]
        before = pairs(known)
        for _ in range(2):
            memories = [lm.new_memory() for _ in DOCUMENTS]
            found = together(
                *asked,
                *(lambda d=d, m=m: lm.ingest(d, m) for d, m in zip(DOCUMENTS, memories, strict=True)),
            )  # fmt: skip
            for number, (answer, wanted) in enumerate(zip(found, want, strict=False)):
                assert equal(answer, wanted), number
            for memory, wanted in zip(memories, alone, strict=True):
                assert equal(pairs(memory), wanted)
            assert equal(pairs(known), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_memory_is_asked_while_others_read_into_it(dtype: str | None) -> None:
    """Each answer is that of some state between two windows; texts that come at once are read one after the other."""
    with attach_memory(tiny_llama(), settings(dtype=dtype, capacity=200)) as lm:
        memory = lm.ingest(DOCUMENTS[0], lm.new_memory(), document="first")
        read: list[Any] = []

        def write(number: int) -> None:
            for part in range(3):
                lm.ingest(DOCUMENTS[1], memory, document=f"{number}.{part}")

        def ask() -> None:
            for _ in range(6):
                seen = memory.snapshot()
                counts = [layer.lengths for layer in seen.layers.values()]
                assert all(count == seen.lengths.tolist() for count in counts)
                assert sum(known.stored for known in seen.documents) == len(seen) == int(seen.log.lengths[0])
                answer = lm.generate(QUESTIONS[0], memory=seen, max_new_tokens=4, do_sample=False)
                read.append((seen, answer))

        together(lambda: write(0), lambda: write(1), ask, ask)
        for seen, answer in read:
            assert torch.equal(lm.generate(QUESTIONS[0], memory=seen, max_new_tokens=4, do_sample=False), answer)
        log = [known.name for known in memory.documents]
        assert len(memory) == 200
        assert len(set(log)) == len(log)
        # As the same texts read one after the other, in the order that was found.
        again = lm.new_memory()
        lm.ingest(DOCUMENTS[0], again)
        for _ in range(6):
            lm.ingest(DOCUMENTS[1], again)
        if dtype is None:
            assert equal(pairs(again), pairs(memory))


@pytest.mark.parametrize("overlap", [0, 4])
def test_what_is_forgotten_meanwhile_does_not_come_back(overlap: int) -> None:
    """Who forgets while another thread generates into a memory waits, and the rest is what it would be afterwards."""
    with attach_memory(tiny_llama(), settings(overlap=overlap)) as lm:
        memory = lm.ingest(DOCUMENTS[0], lm.new_memory(), document="secret")
        lm.ingest(DOCUMENTS[1], memory, document="kept")
        forgetting = threading.Thread(target=lambda: memory.forget("secret"))

        class Meanwhile(StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                if not forgetting.ident:
                    forgetting.start()
                return torch.zeros(len(ids), dtype=torch.bool)

        given = {"max_new_tokens": 20, "do_sample": False, "update_memory": True}
        lm.generate(QUESTIONS[1], memory, stopping_criteria=StoppingCriteriaList([Meanwhile()]), **given)
        forgetting.join()
        assert [known.name for known in memory.documents] == ["kept", None]
        assert len(memory) == DOCUMENTS[1].shape[1] + QUESTIONS[1].shape[1] + 20


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("change", ["forget", "read", "reset", "ask"])
def test_a_text_keeps_its_name_whatever_is_done_between_two_windows(change: str, overlap: int) -> None:
    with attach_memory(tiny_llama(), settings(overlap=overlap)) as lm:
        memory = lm.ingest(DOCUMENTS[0], lm.new_memory(), document="other")
        windows: list[int] = []
        does: dict[str, Callable[[], Any]] = {
            "forget": lambda: memory.forget("other"),
            "read": lambda: lm.ingest(DOCUMENTS[0], memory, document="third"),
            "reset": memory.reset,
            "ask": lambda: lm(QUESTIONS[0], memory=memory, update_memory=True),
        }

        def meanwhile(tokens: int) -> None:
            windows.append(tokens)
            if len(windows) == 2:
                # The log of a copy does not go on with what is being read here.
                alone = lm.ingest(QUESTIONS[0], memory.snapshot()).documents
                assert [known.tokens for known in alone if known.name is None] == [QUESTIONS[0].shape[1]]
                does[change]()

        lm.ingest(DOCUMENTS[1], memory, document="read", progress=meanwhile)
        stored = {known.name: known.stored for known in memory.documents}
        gone = {"forget": {"other"}, "reset": {"other"}}.get(change, set())
        assert set(stored) - {None} == {"other", "read", *({"third"} if change == "read" else ())} - gone
        if change in ("forget", "read"):
            assert stored["read"] == DOCUMENTS[1].shape[1]
        assert (None in stored) == (change == "ask")


def test_a_text_that_is_being_read_is_not_forgotten_by_halves() -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.new_memory()

        def meanwhile(tokens: int) -> None:
            with pytest.raises(SettingError, match="is being read"):
                memory.forget("read")

        lm.ingest(DOCUMENTS[1], memory, document="read", progress=meanwhile)
        assert memory.forget("read") == DOCUMENTS[1].shape[1]


def test_a_memory_that_is_saved_between_two_windows_does_not_go_on_with_their_text(tmp_path: Path) -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.new_memory()
        lm.ingest(DOCUMENTS[1], memory, document="read", progress=lambda tokens: memory.save(tmp_path))
        again = lm.load_memory(tmp_path)
        lm.ingest(QUESTIONS[0], again)
        assert [(known.name, known.tokens) for known in again.documents] == [
            ("read", DOCUMENTS[1].shape[1]),
            (None, QUESTIONS[0].shape[1]),
        ]


def test_forks_of_one_memory_go_on_apart() -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.ingest(DOCUMENTS[0], lm.new_memory())
        want = [pairs(lm.ingest(question, memory.snapshot())) for question in QUESTIONS]
        for _ in range(4):
            found = together(*(lambda q=q: pairs(lm.ingest(q, memory.snapshot())) for q in QUESTIONS))
            assert equal(found, want)
        kept = lm.new_memory()
        together(
            *(
                lambda q=q: lm.generate(q, memory=kept, max_new_tokens=3, do_sample=False, update_memory=True)
                for q in QUESTIONS
            )
        )
        assert len(kept) == sum(q.shape[1] for q in QUESTIONS) + 3 * len(QUESTIONS)


def test_frequencies_that_follow_the_length_are_those_of_each_text() -> None:
    model = tiny_llama()
    stretch_positions(model, RopeSettings("dynamic", 4, original_length=8))
    with attach_memory(model, settings(window=32)) as lm, torch.no_grad():
        works = [lambda q=q: lm(q).logits for q in (*QUESTIONS, tokens(1, 31, 3), tokens(1, 3, 4))]
        want = [work() for work in works]
        for _ in range(3):
            assert equal(together(*works), want)
        assert equal([work() for work in reversed(works)], want[::-1])


@pytest.mark.parametrize("name", ["exact", "hnsw", "faiss_ivf"])
@pytest.mark.parametrize("build", ["background", "blocking"])
def test_a_retriever_is_searched_observed_and_forked_while_keys_come(name: str, build: str) -> None:
    spec: dict[str, Any] = {"name": name, "num_threads": 1, "build": build, "min_index_size": 64}
    spec |= {"hnsw": {"ef_search": 2000}, "faiss_ivf": {"nlist": 2, "nprobe": 2}, "exact": {}}[name]
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 900, 8, generator=generator), torch.randn(2, 40, 8, generator=generator)
    retriever = create_retriever(spec, dim=8, banks=2)
    retriever.add(keys[:, :100])

    def add() -> None:
        for start in range(100, 900, 50):
            retriever.add(keys[:, start : start + 50])

    def search() -> None:
        for _ in range(12):
            retriever.observe(queries)
            before = int(retriever.lengths.min())
            rows = retriever.search(queries[:, :3], 5)
            after = int(retriever.lengths.max())
            for bank in range(2):
                scores = queries[bank, :3] @ keys[bank].T
                found = scores.gather(1, rows[bank])
                # At least as good as what was there before, and nothing that came after.
                assert bool((rows[bank] < after).all())
                assert bool((found >= scores[:, :before].topk(5).values - 1e-4).all())

    def fork() -> None:
        for _ in range(12):
            twin = retriever.fork()
            length = int(twin.lengths[0])
            twin.add(torch.full((2, 30, 8), 50.0))
            rows = twin.search(torch.ones(2, 1, 8), 5)
            assert bool((rows >= length).all())

    together(add, search, search, fork, fork)
    retriever.flush()
    rows = retriever.search(queries, 5)
    for bank in range(2):
        scores = queries[bank] @ keys[bank].T
        torch.testing.assert_close(scores.gather(1, rows[bank]), scores.topk(5).values)
    assert retriever.stats().fallbacks == 0
