"""Dictionary lookup at any size: what is in the memory, what is asked, and how it is scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_fot import EvaluationConfig, attach_memory
from lightning_fot.config.tasks import DictionaryTask
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.measures.passkey import wilson
from lightning_fot.evaluation.plan import plan
from lightning_fot.evaluation.tasks.dictionary import DictionaryLookup
from lightning_fot.evaluation.tasks.parts.episode import Probe
from lightning_fot.evaluation.tasks.runner import ask
from lightning_fot.model.reading.batched import read, windows_are_independent
from lightning_fot.report.content.task_tables import tasks
from tests.support.byte_tokenizer import BOS, FIRST, PAD, ByteTokenizer
from tests.support.models import settings, tiny_llama
from tests.support.oracle import dense_logits

KEY, VALUE, QUESTION = FIRST, FIRST + 1, FIRST + 2
WINDOW = 32
TASK = DictionaryTask(tokens=[256, 128], questions=7)
NOTHING_ELSE: dict[str, Any] = {"context_tokens": [], "passkey_tokens": []}


@pytest.fixture
def lm():
    with attach_memory(tiny_llama(), settings(window=WINDOW)) as lm:
        yield lm


def records(ids: np.ndarray, marker: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Keys and values behind each marker."""
    places = np.flatnonzero(ids == marker)
    assert (ids[places + 5] == VALUE).all()
    return [(tuple(ids[place + 1 : place + 5]), tuple(ids[place + 6 : place + 10])) for place in places.tolist()]


@pytest.mark.parametrize("window", [32, 100, 256])
def test_a_larger_memory_begins_with_the_smaller_and_the_questions_stay(window: int) -> None:
    task = DictionaryTask(tokens=[3000, 1024, 20_000], questions=40)
    lookup = DictionaryLookup(task, ByteTokenizer(), window, window)
    found = {length: lookup.episodes(length)[0] for length in task.tokens}
    longest = found[20_000].context
    asked = [record for probe in found[1024].probes for record in records(probe.ids, QUESTION)]
    assert len(asked) == len(set(asked)) == 40
    for length, episode in found.items():
        assert len(episode.context) == length // window * window
        assert np.array_equal(episode.context, longest[: len(episode.context)])
        assert [probe.ids.tolist() for probe in episode.probes] == [p.ids.tolist() for p in found[1024].probes]
        defined = records(episode.context, KEY)
        assert len(defined) == length // window * ((window - 1) // 10) == task.records(length, window)
        assert len(dict(defined)) == len(defined)  # keys differ
        assert set(asked) <= set(defined)
    for page in longest.reshape(-1, window):
        # A start token, whole records, padding: as a training document begins.
        assert (page[0], set(page[1::10][: (window - 1) // 10])) == (BOS, {KEY})
        assert set(page[1 + (window - 1) // 10 * 10 :]) <= {PAD}
    for probe in found[1024].probes:
        assert len(probe.ids) <= window
        values = [tuple(probe.ids[start:stop]) for start, stop in probe.answers]
        assert values == [value for _, value in records(probe.ids, QUESTION)]
    # Another order of lengths, or fewer, changes nothing; another seed does.
    alone = DictionaryLookup(DictionaryTask(tokens=[1024], questions=40), ByteTokenizer(), window, window)
    assert np.array_equal(alone.episodes(1024)[0].context, found[1024].context)
    other = DictionaryLookup(DictionaryTask(tokens=[1024], questions=40, seed=1), ByteTokenizer(), window, window)
    assert not np.array_equal(other.episodes(1024)[0].context, found[1024].context)


@pytest.mark.parametrize("kind", ["none", "exact"])
def test_scores_are_those_of_one_dense_pass(lm, kind: str) -> None:
    config = EvaluationConfig(**NOTHING_ELSE, dictionary=TASK)
    rows = {
        row["context_tokens"]: row
        for row in evaluate(lm, ByteTokenizer(), [], config)["tasks"]
        if row["memory"] == kind
    }
    lookup = DictionaryLookup(TASK, ByteTokenizer(), WINDOW, WINDOW)
    for length in (128, 256):
        nats, right = [], []
        for probe in lookup.episodes(length)[0].probes:
            context = lookup.episodes(length)[0].context if kind == "exact" else probe.ids[:0]
            ids = [*context.tolist(), *probe.ids.tolist()]
            logits = dense_logits(lm.model, ids, WINDOW, [1, 3])[len(context) :]
            for start, stop in probe.answers:
                wanted = torch.from_numpy(probe.ids[start:stop]).long()
                predicted = logits[start - 1 : stop - 1]
                nats.append(float(torch.nn.functional.cross_entropy(predicted, wanted)))
                right.append((predicted.argmax(1) == wanted).tolist())
        row = rows[length]
        assert (row["n"], row["correct"]) == (7, sum(map(all, right)))
        assert row["accuracy"] == row["correct"] / 7
        assert (row["low"], row["high"]) == wilson(row["correct"], 7)
        assert row["token_accuracy"] == pytest.approx(np.mean(right))
        assert row["nll"] == pytest.approx(np.mean(nats), abs=1e-5)
        assert row["nll_standard_error"] == pytest.approx(np.std(nats, ddof=1) / 7**0.5, abs=1e-5)


def test_an_answer_counts_when_greedy_decoding_gives_it_whole(lm) -> None:
    prompt = torch.randint(3, 66, (1, 20), generator=torch.Generator().manual_seed(0))
    memory = lm.ingest(torch.randint(3, 66, (1, 64)), lm.new_memory())
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, lm(ids, memory=memory).logits[:, -1:].argmax(-1)], dim=1)
    right = ids[0].numpy().astype(np.int32)
    wrong = right.copy()
    wrong[-1] += 1
    # The second answer sees the first, right or wrong.
    for tokens, expected in ((right, [True, True]), (wrong, [True, False])):
        answers = ask(lm, Probe(tokens, ((20, 22), (22, 24))), memory)
        assert [answer.correct for answer in answers] == expected
    assert len(memory) == 64


@pytest.mark.parametrize("changes", [{}, {"skip_window_start": 1}, {"dtype": "bfloat16"}, {"capacity": 50}])
@pytest.mark.parametrize("layers", [[2], [1, 3]])
def test_windows_read_together_store_what_they_store_one_by_one(layers: list[int], changes: dict[str, Any]) -> None:
    with attach_memory(tiny_llama(), settings(memory_layers=layers, **changes)) as lm:
        assert windows_are_independent(lm.attachment) == (layers == [2])
        ids = torch.randint(3, 66, (16 * 5 + 3,), generator=torch.Generator().manual_seed(1))
        one_by_one = lm.ingest(ids[None], lm.new_memory())
        together, done = lm.new_memory(), []
        read(lm.attachment, ids, together, done.append)
        assert sum(done) == len(ids)
        assert together.lengths.tolist() == one_by_one.lengths.tolist()
        assert together.tokens_seen.tolist() == one_by_one.tokens_seen.tolist()
        for number, layer in one_by_one.layers.items():
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if "dtype" in changes else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(together.layers[number].keys, layer.keys, **tolerance)
            torch.testing.assert_close(together.layers[number].values, layer.values, **tolerance)
        # Which token each pair came from.
        assert together.log.rows_of(0).tolist() == one_by_one.log.rows_of(0).tolist()


def _without_times(results: dict[str, Any]) -> list[dict[str, Any]]:
    clock = ("question_ms", "read_tokens_per_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in results["tasks"]]


@pytest.mark.slow
def test_each_size_is_kept_and_the_memory_grows_again(lm) -> None:
    lm.config.retriever = {"name": "hnsw", "min_index_size": 200, "num_threads": 1}
    config = EvaluationConfig(**NOTHING_ELSE, dictionary=TASK)
    records: dict[str, Any] = {}
    whole = evaluate(lm, ByteTokenizer(), [], config, on_result=records.__setitem__)
    names = [f"dictionary: {kind}, {length} tokens" for kind in ("no memory", "hnsw", "exact") for length in (128, 256)]
    assert list(records) == names == [name for name, _ in plan(config, "hnsw", WINDOW)]
    # The larger memory reads what the smaller one lacks.
    assert [records[name][0].get("read_tokens") for name in names] == [None, None, 128, 128, 128, 256]
    # Too small for the index: exact search is not done again.
    small, indexed = (next(r for r in whole["tasks"] if (r["memory"], r["context_tokens"]) == c)
                      for c in (("exact", 128), ("hnsw", 256)))  # fmt: skip
    assert small["same_as"] == "hnsw"
    assert indexed["index_used"] is True
    assert 0.9 < indexed["recall"] <= 1
    assert 0.9 < indexed["mass_recall"] <= 1
    for stop in (2, 3, 5):
        done = {name: records[name] for name in names[:stop]}
        again = evaluate(lm, ByteTokenizer(), [], config, done=done)
        assert _without_times(again) == _without_times(whole)
    titles = [table.title for table in tasks(whole)]
    assert titles[0].startswith("Dictionary accuracy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": []}, r"dictionary\.tokens=\[\]: must be a list of numbers"),
        ({"tokens": [16, 0]}, r"dictionary\.tokens=\[16, 0\]: 0 is not a whole number"),
        ({"questions": 0}, r"dictionary\.questions=0: must be a whole number of at least 1"),
        ({"vocabulary": 5}, r"dictionary\.vocabulary=5: gives 16 different keys"),
        ({"token": [5]}, r"dictionary\.token=\[5\]: is not a setting\. Known here: tokens"),
        ([4], r"dictionary=\[4\]: is not a mapping"),
    ],
)
def test_wrong_settings_are_named(given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        EvaluationConfig(dictionary=given)


def test_what_does_not_fit_the_model_is_told_before_any_work(lm) -> None:
    for task, message in (
        (DictionaryTask(tokens=[128], questions=13), r"questions=13: the smallest memory of 128 tokens holds 12 rec"),
        (DictionaryTask(tokens=[4096], vocabulary=1000), r"evaluation\.dictionary\.vocabulary=1000: the tokenizer has"),
    ):
        with pytest.raises(SettingError, match=message):
            evaluate(lm, ByteTokenizer(), [], EvaluationConfig(**NOTHING_ELSE, dictionary=task))
    with pytest.raises(SettingError, match=r"model\.memory\.window=10: a record takes 11 tokens"):
        TASK.check(10)
