"""Context read without a memory, in ``results.json``, against the bare backbone of transformers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_fot import EvaluationConfig, MemoryConfig, attach_memory
from lightning_fot.data.mixture.passkey import passkey_prompt
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.plan import plan
from lightning_fot.pretrained import load_backbone, load_tokenizer

WINDOW, TARGET = 64, 100
CONTEXTS = [128, 256]


@dataclass
class Document:
    name: str
    ids: np.ndarray


class Counter:
    """What is used of a progress display: the units of each phase."""

    def __init__(self) -> None:
        self.units: dict[str, float] = {}

    def plan(self, phases: object) -> None:
        pass

    def start(self, name: str) -> None:
        self.name = name

    def advance(self, units: float, note: str = "") -> None:
        self.units[self.name] = self.units.get(self.name, 0.0) + units

    def finish(self, name: str) -> None:
        pass


def _config(*readings: str) -> EvaluationConfig:
    return EvaluationConfig(CONTEXTS, TARGET, passkey_tokens=[384], passkey_samples=2, readings=list(readings))


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    random = np.random.default_rng(0)
    return [Document(f"d{tokens}", random.integers(3, 200, tokens)) for tokens in (600, 386)]


def test_full_context_rows_are_those_of_the_bare_backbone(documents: list[Document]) -> None:
    tokenizer, model, config = (
        load_tokenizer("tiny-random-llama"),
        load_backbone("tiny-random-llama"),
        _config("full_context"),
    )
    progress = Counter()
    with attach_memory(model, MemoryConfig(memory_layers=[], window=WINDOW)) as lm:
        result = evaluate(lm, tokenizer, documents, config, progress)
    rows = {(row["memory"], row["context_tokens"]): row for row in result["perplexity"]}
    assert sorted(rows) == [(kind, context) for kind in ("full_context", "none") for context in CONTEXTS]
    for context in CONTEXTS:
        losses = []
        for document in documents:
            ids = torch.as_tensor(document.ids[max(CONTEXTS) - context : max(CONTEXTS) + TARGET + 1]).long()
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0, -TARGET:]
            losses.append(F.cross_entropy(logits, ids[-TARGET:]))
        row = rows["full_context", context]
        assert row["nll"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
        assert row["gain_nats"] == pytest.approx(rows["none", context]["nll"] - row["nll"], abs=1e-9)
        assert row["ingest_tokens_per_s"] > 0
        assert row["target_tokens_per_s"] > 0
    right = 0
    for sample in range(2):
        example = passkey_prompt(tokenizer, 384, seed=sample)
        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        with torch.no_grad():
            said = model(ids[:, :-1]).logits[0, -len(example.answer_ids) :].argmax(-1)
        right += said.tolist() == list(example.answer_ids)
    tasks = {row["memory"]: row for row in result["tasks"]}
    assert set(tasks) == {"none", "full_context"}
    assert (tasks["full_context"]["correct"], tasks["full_context"]["n"]) == (right, 2)
    assert result["retrieval"] == result["exact"] == []
    planned = plan(config, "exact", WINDOW)
    assert list(progress.units) == [name for name, _ in planned]
    for name, cost in planned:
        assert progress.units[name] == pytest.approx(cost, rel=0.05), name


def test_full_context_stands_beside_a_memory(documents: list[Document]) -> None:
    tokenizer, config = load_tokenizer("tiny-random-llama"), _config("memory", "full_context")
    with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1], window=WINDOW)) as lm:
        result = evaluate(lm, tokenizer, documents, config)
    assert {row["memory"] for row in result["perplexity"]} == {"none", "exact", "full_context"}
    assert {row["memory"] for row in result["tasks"]} == {"none", "exact", "full_context"}
    assert {row["retriever"] for row in result["retrieval"]} == {"exact"}


def test_a_reading_that_the_model_cannot_do_is_refused_before_it_is_tried(documents: list[Document]) -> None:
    config, tokenizer = _config("previous_window"), load_tokenizer("tiny-random-llama")
    lm = attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1], window=WINDOW))
    with lm, pytest.raises(SettingError, match="readings="):
        evaluate(lm, tokenizer, documents, config)
