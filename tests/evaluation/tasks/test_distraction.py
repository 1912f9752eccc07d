"""Whose keys the attention goes to among d documents, against one softmax written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fot import EvaluationConfig, attach_memory
from lightning_fot.config.tasks import DistractionTask
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.tasks.parts.texts import select_texts
from lightning_fot.report.content.task_tables import distraction
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import WINDOW, settings, tiny_llama
from tests.support.oracle import rms_norm, rotated

LAYER, CONTEXT = 2, 40
NOTHING_ELSE: dict[str, Any] = {"context_tokens": [], "passkey_tokens": []}


def documents(count: int, tokens: int = CONTEXT + WINDOW) -> list[SimpleNamespace]:
    draw = torch.Generator().manual_seed(0)
    return [
        SimpleNamespace(name=str(n), ids=torch.randint(3, 101, (tokens,), generator=draw).numpy()) for n in range(count)
    ]


def projections(model: Any, ids: torch.Tensor, windows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (T, H, D) and keys (T, G, D) of the memory layer, not rotated, by transformers' own layers below it."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hidden = []
    for part in torch.split(ids, windows):
        states = model.model.embed_tokens(part[None])
        places = torch.arange(len(part))[None]
        angles = LlamaRotaryEmbedding(model.config)(states, places)
        mask = torch.full((len(part), len(part)), -math.inf).triu(1)[None, None]
        for layer in model.model.layers[:LAYER]:
            states = layer(states, attention_mask=mask, position_embeddings=angles)
        hidden.append(states[0])
    layer = model.model.layers[LAYER]
    normed = rms_norm(torch.cat(hidden), layer.input_layernorm.weight, model.config.rms_norm_eps)
    attention = layer.self_attn
    return attention.q_proj(normed).view(len(ids), 4, 16), attention.k_proj(normed).view(len(ids), 2, 16)


@torch.no_grad()
def expected(texts: list[SimpleNamespace], count: int, scored: int, top_k: int) -> dict[str, list[float]]:
    """By plain loops: each scored document's window over the keys of all documents of its group, and its own."""
    model = tiny_llama(attn_implementation="eager")
    found: dict[str, list[float]] = {"own_share": [], "own_share_found": [], "memory_mass": []}
    windows = [WINDOW] * (CONTEXT // WINDOW) + [CONTEXT % WINDOW] * (CONTEXT % WINDOW > 0)
    ids = [torch.from_numpy(text.ids).long() for text in texts]
    keys = [projections(model, one[:CONTEXT], windows)[1] for one in ids]
    for number in range(scored):
        start = number // count * count
        group, own = torch.cat(keys[start : start + count]), number - start
        queries, local = projections(model, ids[number][CONTEXT:], [WINDOW])
        shares, found_shares, masses = [], [], []
        for head in range(4):
            query = rotated(queries[:, head], torch.arange(WINDOW), 10_000.0)
            far = query @ group[:, head // 2].double().T / 4
            near = query @ rotated(local[:, head // 2], torch.arange(WINDOW), 10_000.0).T / 4
            near = near.masked_fill(torch.ones(WINDOW, WINDOW).triu(1).bool(), -math.inf)
            mine = torch.zeros(far.shape[1], dtype=torch.bool)
            mine[own * CONTEXT : (own + 1) * CONTEXT] = True
            shares.append(far.softmax(1)[:, mine].sum(1))
            best = torch.zeros_like(far).scatter(1, far.topk(min(top_k, far.shape[1]), dim=1).indices, 1.0).bool()
            weights = torch.cat([far.masked_fill(~best, -math.inf), near], dim=1).softmax(1)[:, : far.shape[1]]
            masses.append(weights.sum(1))
            found_shares.append(weights[:, mine].sum(1))
        found["own_share"].append(float(torch.cat(shares).mean()))
        found["memory_mass"].append(float(torch.cat(masses).mean()))
        found["own_share_found"].append(float(torch.cat(found_shares).sum() / torch.cat(masses).sum()))
    return found


@pytest.mark.parametrize("top_k", [5, 4096])
def test_shares_are_those_of_the_softmax_written_out(top_k: int) -> None:
    texts = documents(4)
    task = DistractionTask(tokens=[CONTEXT], documents=[4, 2], scored=3)
    with attach_memory(tiny_llama(), settings(memory_layers=[LAYER], top_k=top_k)) as lm:
        config = EvaluationConfig(**NOTHING_ELSE, distraction=task)
        rows = evaluate(lm, ByteTokenizer(), [], config, texts={"distraction": texts})["distraction"]
    assert [(row["documents"], row["memory"], row["n"], row["chance"]) for row in rows] == [
        (2, "exact", 3, 0.5),
        (4, "exact", 3, 0.25),
    ]
    for row in rows:
        for field, values in expected(texts, row["documents"], 3, top_k).items():
            values = torch.tensor(values)
            assert row[field] == pytest.approx(float(values.mean()), abs=1e-5), field
            assert row[f"{field}_standard_error"] == pytest.approx(float(values.std() / 3**0.5), abs=1e-5)
    table = distraction({"distraction": rows})
    assert table.columns == ("memory", "d=2", "d=4")


@pytest.mark.slow
def test_random_weights_do_not_tell_documents_apart() -> None:
    task = DistractionTask(tokens=[CONTEXT], documents=[1, 2, 8], scored=8)
    with attach_memory(tiny_llama(), settings(retriever={"name": "hnsw", "min_index_size": 64})) as lm:
        config = EvaluationConfig(**NOTHING_ELSE, distraction=task)
        rows = evaluate(lm, ByteTokenizer(), [], config, texts={"distraction": documents(8)})["distraction"]
    assert {row["memory"] for row in rows} == {"hnsw", "exact"}
    for row in rows:
        assert row["own_share"] == pytest.approx(row["chance"], rel=0.35)
        assert 0 < row["memory_mass"] < 1
    assert [row["index_used"] for row in rows if row["memory"] == "hnsw"] == [False, True, True]


def test_too_few_documents_are_named() -> None:
    task = DistractionTask(tokens=[64], documents=[3], scored=4)
    assert task.texts(WINDOW) == (6, 64 + WINDOW)
    asked = []
    with pytest.raises(SettingError, match=r"distraction\.tokens=\[64\]: takes 6 held-out documents of 80 tokens, and"):
        select_texts([task], WINDOW, lambda tokens, limit: asked.append((tokens, limit)) or documents(5, 80), list)
    assert asked == [(80, 6)]
    with pytest.raises(SettingError, match=r"distraction\.documents=\[0\]: 0 is not a whole number"):
        EvaluationConfig(distraction={"documents": [0]})
