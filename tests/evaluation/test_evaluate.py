from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_fot import EvaluationConfig, MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.plan import SO_FAR, plan
from lightning_fot.evaluation.rows import summarise
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone, load_tokenizer

WINDOW = 128
CONFIG = EvaluationConfig(
    context_tokens=[256, 128],
    target_tokens=130,
    documents=2,
    passkey_tokens=[384],
    passkey_samples=2,
    retrieval_queries=32,
    retrieval_repeats=2,
)


class Killed(Exception):
    pass


@dataclass
class Document:
    name: str
    ids: np.ndarray


class Progress:
    def __init__(self) -> None:
        self.planned: dict[str, float] = {}
        self.started: list[str] = []
        self.finished: list[str] = []
        self.units: dict[str, float] = {}

    def plan(self, phases: Any) -> None:
        self.planned |= dict(phases)

    def start(self, name: str) -> None:
        self.started.append(name)

    def advance(self, units: float, note: str = "") -> None:
        self.units[self.started[-1]] = self.units.get(self.started[-1], 0.0) + units

    def finish(self, name: str) -> None:
        self.finished.append(name)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("tiny-random-llama")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    random = np.random.default_rng(0)
    return [Document(f"d{tokens}", random.integers(3, 200, tokens)) for tokens in (100, 600, 386, 900)]


@pytest.fixture
def attach() -> Iterator[Any]:
    made: list[MemoryLM] = []

    def make(retriever: Any, **kw: Any) -> MemoryLM:
        config = MemoryConfig(memory_layers=[1, 3], window=WINDOW, top_k=8, retriever=retriever, **kw)
        made.append(attach_memory(load_backbone("tiny-random-llama"), config))
        return made[-1]

    yield make
    for lm in made:
        lm.detach()


@pytest.fixture
def lm(attach: Any) -> MemoryLM:
    # One thread: several insert keys in another order each time, and the graph differs.
    made: MemoryLM = attach({"name": "hnsw", "min_index_size": 100, "num_threads": 1})
    return made


def without_times(result: Any) -> Any:
    """Results but for what depends on the clock."""
    if isinstance(result, dict):
        # Indexes are built beside the reading: how many times depends on which is faster.
        clock = ("_s", "question_ms", "qps", "search_ms_p50", "search_ms_p95", "search_ms_p99", "search_ms", "rebuilds",
                 "seconds", "ms_p50", "limit_ms", "limit_by", "limit_amount", "limit_rate", "of_limit")  # fmt: skip
        return {key: without_times(value) for key, value in result.items() if not key.endswith(clock)}
    return [without_times(item) for item in result] if isinstance(result, list) else result


@pytest.mark.slow
def test_all_rows_are_there_and_say_how_many(
    lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    progress = Progress()
    progress.plan(plan(CONFIG, lm.config.retriever, WINDOW))
    seen: dict[str, Any] = {}
    result = evaluate(lm, tokenizer, documents, CONFIG, progress, on_result=seen.__setitem__)
    assert json.loads(json.dumps(result)) == result
    cells = [(row["memory"], row["context_tokens"]) for row in result["perplexity"]]
    assert sorted(cells) == sorted((kind, c) for kind in ("none", "exact", "hnsw") for c in (128, 256))
    for row in result["perplexity"]:
        assert row["value"] == pytest.approx(math.exp(row["nll"]))
        assert (row["tokens"], row["documents"], row["blocks"]) == (260, 2, 2)
        assert row["standard_error"] > 0
    none = [row for row in result["perplexity"] if row["memory"] == "none"]
    assert none[0]["value"] == none[1]["value"]
    for row in result["perplexity"]:
        if row["memory"] != "none":
            assert row["gain_nats"] == pytest.approx(none[0]["nll"] - row["nll"], abs=1e-9)
            assert row.get("index_used") is (True if row["memory"] == "hnsw" else None)
    assert {(row["memory"], row["n"]) for row in result["tasks"]} == {("none", 2), ("exact", 2), ("hnsw", 2)}
    for row in result["tasks"]:
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert 0 <= row["key_in_window"] <= 2
    assert {row["layer"] for row in result["retrieval"]} == {1, 3}
    for row in result["retrieval"] + result["exact"]:
        assert row["memory_tokens"] == 256
        assert 0 <= row["recall"] <= 1
        assert {"k", "retriever", "args", "mass_recall", "search_ms_p50", "search_ms_p95", "qps", "add_s", "build_s",
                "bytes"} <= row.keys()  # fmt: skip
    assert all(row["recall"] == 1 for row in result["exact"])
    for layer in (1, 3):
        assert sum(bool(row.get("configured")) for row in result["retrieval"] if row["layer"] == layer) == 1
    assert [row["layer"] for row in result["retrieval_in_run"]] == [1, 3]
    assert all(row["indexed_share"] > 0 for row in result["retrieval_in_run"])
    assert progress.started == progress.finished == [name for name, _ in plan(CONFIG, "hnsw", WINDOW)]
    assert [name for name in seen if not name.endswith(SO_FAR)] == progress.finished
    for name, cost in progress.planned.items():
        if cost:
            assert progress.units[name] == pytest.approx(cost, rel=0.05), name


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(
    lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    needles = {"tokens": [600], "keys": 1, "asked": 1, "samples": 2}
    config = dataclasses.replace(CONFIG, needles=needles, readings=["memory", "full_context"])  # type: ignore[arg-type]
    names: list[str] = []
    whole = evaluate(lm, tokenizer, documents, config, on_result=lambda name, record: names.append(name))
    so_far = [place for place, name in enumerate(names) if name.endswith(SO_FAR)]
    assert {names[place].split(":")[0] for place in so_far} == {"perplexity", "passkey", "needles"}
    retrieval = next(place for place, name in enumerate(names) if name.startswith("retrieval"))

    # Before retrieval the queries are lost that the perplexity of the longest context left.
    for last in (0, 1, retrieval - 1, *so_far[len(so_far) // 2 :: 3], len(names) - 2):
        kept: dict[str, Any] = {}
        calls: list[str] = []

        def keep(name: str, record: Any, kept: dict[str, Any] = kept, calls: list[str] = calls) -> None:
            kept.pop(name + SO_FAR, None)
            kept[name] = json.loads(json.dumps(record))
            calls.append(name)
            if len(calls) == last + 1:  # noqa: B023
                raise Killed

        with pytest.raises(Killed):
            evaluate(lm, tokenizer, documents, config, on_result=keep)
        assert json.dumps(summarise(kept, config, lm.config.retriever))
        again = evaluate(lm, tokenizer, documents, config, done=dict(kept), on_result=keep)
        # Nothing is measured twice.
        assert calls == names
        assert without_times(again) == without_times(whole)


@pytest.mark.slow
def test_beyond_exact_tokens_the_retriever_is_alone(
    lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    config = dataclasses.replace(CONFIG, passkey_tokens=[256, 384], exact_tokens=256)
    progress = Progress()
    result = evaluate(lm, tokenizer, documents, config, progress)
    lengths = {"none": [256, 384], "exact": [256], "hnsw": [256, 384]}
    for kind, wanted in lengths.items():
        assert [row["context_tokens"] for row in result["tasks"] if row["memory"] == kind] == wanted
        assert {row["context_tokens"] for row in result["passkey_depths"] if row["memory"] == kind} == set(wanted)
    planned = dict(plan(config, lm.config.retriever, WINDOW))
    assert progress.units["passkey: exact"] == pytest.approx(planned["passkey: exact"], rel=0.05)


def test_the_lengths_that_exact_search_answers_may_need_no_index(
    attach: Any, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    """Then they are the retriever's own, as planned, though it has an index at the others."""
    config = dataclasses.replace(CONFIG, context_tokens=[], passkey_tokens=[256, 640], exact_tokens=256)
    lm, progress = attach({"name": "hnsw", "min_index_size": 300, "num_threads": 1}), Progress()
    rows = evaluate(lm, tokenizer, documents, config, progress)["tasks"]
    assert [row.get("index_used") for row in rows if row["memory"] == "hnsw"] == [False, True]
    assert [(row["context_tokens"], row["same_as"]) for row in rows if row["memory"] == "exact"] == [(256, "hnsw")]
    assert dict(plan(config, lm.config.retriever, WINDOW))["passkey: exact"] == 0
    assert not progress.units.get("passkey: exact")


@pytest.mark.slow
def test_below_the_size_of_an_index_exact_is_the_same_and_says_so(
    attach: Any, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    indexed = evaluate(attach("hnsw"), tokenizer, documents, CONFIG)
    exact = evaluate(attach("exact"), tokenizer, documents, CONFIG)
    reused = [row for row in indexed["perplexity"] + indexed["tasks"] if row["memory"] == "exact"]
    computed = [row for row in exact["perplexity"] + exact["tasks"] if row["memory"] == "exact"]
    assert len(reused) == len(computed) == 3
    for ours, theirs in zip(reused, computed, strict=True):
        assert ours["same_as"] == "hnsw"
        assert "same_as" not in theirs
        field = "accuracy" if "task" in ours else "value"
        assert ours[field] == pytest.approx(theirs[field], rel=1e-5)
    assert all(row["index_used"] is False for row in indexed["perplexity"] if row["memory"] == "hnsw")
    assert all(row["index_used"] is False for row in indexed["retrieval"])
    assert exact["retrieval"] == exact["exact"]
    assert not any("index_used" in row for row in exact["perplexity"])


def test_the_model_is_left_as_it_was(
    lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    config = EvaluationConfig(context_tokens=[64], target_tokens=32, documents=1, passkey_tokens=[])
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    lm.train()
    frozen = next(lm.model.children())
    frozen.eval()
    modes = [module.training for module in lm.model.modules()]
    evaluate(lm, tokenizer, documents, config)
    assert [module.training for module in lm.model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    # No tensor of the evaluation may reach a backward pass.
    ids = torch.randint(3, 200, (1, WINDOW))
    lm(ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in lm.model.parameters())


@pytest.mark.slow
def test_it_asks_with_another_factor_and_leaves_the_models_own(
    attach: Any, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> None:
    config = EvaluationConfig(context_tokens=[128], target_tokens=64, documents=1, passkey_tokens=[])

    def losses(own: float, asked: float | None) -> list[float]:
        lm = attach("exact", score_factor=own)
        results = evaluate(lm, tokenizer, documents, dataclasses.replace(config, score_factor=asked))
        assert lm.attachment.score_factor == own
        return [row["nll"] for row in results["perplexity"]]

    assert losses(1.0, 3.0) == losses(3.0, None) == losses(2.0, 3.0)
    assert losses(1.0, None) != losses(3.0, None)
    with pytest.raises(SettingError, match=r"evaluation\.score_factor=0.*above 0"):
        EvaluationConfig(score_factor=0)


def test_passkey_prompts_shorter_than_a_window_need_no_memory(attach: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = attach("exact")
    lm.config.window = 1024
    result = evaluate(lm, tokenizer, [], EvaluationConfig(context_tokens=[], passkey_tokens=[384]))
    assert all(row["key_in_window"] == row["n"] for row in result["tasks"])
    accuracies = {row["memory"]: row["accuracy"] for row in result["tasks"]}
    assert accuracies["none"] == accuracies["exact"]
    assert result["perplexity"] == result["retrieval"] == []


def test_errors_come_before_any_work(lm: MemoryLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SettingError, match=r"evaluation\.context_tokens"):
        evaluate(lm, tokenizer, [], CONFIG)
    with pytest.raises(SettingError, match=r"evaluation\.passkey_tokens"):
        evaluate(lm, tokenizer, [], EvaluationConfig(context_tokens=[], passkey_tokens=[64]))
