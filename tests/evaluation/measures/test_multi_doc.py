"""Other documents in the memory: what is scored, and whose keys the attention goes to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_fot import CrossbatchDataModule, MemoryConfig, attach_memory
from lightning_fot.config import EvaluationConfig
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.measures.multi_doc import measure_distraction, own_share
from lightning_fot.evaluation.plan import INGEST_COST, select_distractors
from lightning_fot.evaluation.rows import summarise
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.report.content.tables import multi_doc
from lightning_fot.report.content.task_tables import depths

CONFIG = EvaluationConfig(
    context_tokens=[64, 128], target_tokens=48, distractor_tokens=[100, 200], documents=2, passkey_tokens=[],
    retrieval_queries=8, retrieval_repeats=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    with attach_memory(
        load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1, 3], window=32, top_k=8)
    ) as lm:
        yield lm


def _documents(count: int, length: int) -> list[SimpleNamespace]:
    draw = np.random.default_rng(0)
    return [SimpleNamespace(name=f"d{n}", ids=draw.integers(3, 250, length)) for n in range(count)]


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_behind_other_documents(lm):
    documents = _documents(5, 200)
    others = select_distractors(documents, documents[:2], CONFIG)
    assert np.array_equal(others, np.concatenate([documents[2].ids, documents[3].ids])[:200])
    results = evaluate(lm, load_tokenizer("tiny-random-llama"), documents[:2], CONFIG, distractors=others)
    rows = {row["distractor_tokens"]: row for row in results["multi_doc"]}
    assert sorted(rows) == [0, 100, 200]
    # Without others it is the perplexity at the longest context.
    plain = next(r for r in results["perplexity"] if (r["context_tokens"], r["memory"]) == (128, "exact"))
    assert rows[0]["nll"] == pytest.approx(plain["nll"], abs=1e-6)
    assert rows[0]["rise_nats"] == 0
    assert rows[0]["own_share"] == pytest.approx(1.0)
    for amount in (100, 200):
        losses = []
        for document in documents[:2]:
            ids = torch.as_tensor(document.ids)[None]
            memory = lm.new_memory(1)
            # In the pieces in which it becomes more: a window ends where a piece does.
            for start in range(0, amount, 100):
                lm.ingest(torch.as_tensor(others)[None, start : start + 100], memory=memory)
            lm.ingest(ids[:, :128], memory=memory)
            logits = lm(ids[:, 128:176], memory=memory).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 129:177]))
        nll = float(torch.stack(losses).mean())
        assert rows[amount]["nll"] == pytest.approx(nll, abs=1e-5)
        assert rows[amount]["rise_nats"] == pytest.approx(nll - rows[0]["nll"], abs=1e-5)
        assert 0 < rows[amount]["own_share"] < 1
    assert rows[200]["own_share"] < rows[100]["own_share"]


@torch.no_grad()
def test_own_share_is_the_softmax_mass_of_the_rows_behind_the_others(lm):
    memory = lm.new_memory(1)
    lm.ingest(torch.randint(3, 250, (1, 96), generator=torch.Generator().manual_seed(1)), memory=memory)
    generator = torch.Generator().manual_seed(2)
    queries = {number: torch.randn(memory.layers[number].kv_heads, 5, 16, generator=generator) for number in (1, 3)}
    dim = memory.layers[1].keys.shape[-1]
    queries = {number: found[..., :1].expand(-1, -1, dim).contiguous() for number, found in queries.items()}
    shares = []
    for number, found in queries.items():
        keys = memory.layers[number].keys[0].double()
        weights = torch.softmax(found.double() @ keys.transpose(1, 2) / dim**0.5, dim=-1)
        shares.append(weights[..., 60:].sum(-1).flatten())
    expected = float(torch.cat(shares).mean())
    assert own_share(lm, memory, queries, {1: 60, 3: 60}) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_memory_with_a_capacity_tells_no_share(lm):
    documents = _documents(4, 200)
    others = select_distractors(documents, documents[:1], CONFIG)
    with attach_memory(
        load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1, 3], window=32, top_k=8, capacity=160)
    ) as small:
        rows = evaluate(small, load_tokenizer("tiny-random-llama"), documents[:1], CONFIG, distractors=others)[
            "multi_doc"
        ]
    assert [row["distractor_tokens"] for row in rows] == [0, 100, 200]
    # The oldest rows went, and those that are left were renumbered: whose they are is not known.
    assert [row["own_share"] for row in rows] == [None] * 3
    assert all(row["value"] > 1 for row in rows)
    assert multi_doc({"multi_doc": rows}) is not None


class Killed(Exception):
    """What ends an evaluation in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("with_folder", [True, False])
def test_killed_after_any_document_it_goes_on_behind_it(lm, tmp_path, after, with_folder):
    documents = _documents(5, 200)
    others = torch.as_tensor(select_distractors(documents, documents[:2], CONFIG))
    texts = [(d.name, torch.as_tensor(d.ids[:128]), torch.as_tensor(d.ids[128:177])) for d in documents[:2]]
    folder = tmp_path / "memory" if with_folder else None

    def measure(**kw):
        units = []
        rows = measure_distraction(lm, "exact", texts, others, [0, 100, 200], units.append, folder=folder, **kw)
        return [{key: value for key, value in row.items() if key != "target_s"} for row in rows], sum(units)

    whole, all_of_it = measure()
    kept = []

    def keep(rows):
        kept[:] = json.loads(json.dumps(rows))
        if len(rows) == after:
            raise Killed

    with pytest.raises(Killed):
        measure(keep=keep)
    assert len(kept) == after
    rows, units = measure(done=kept)
    assert rows == whole
    # The others as far as they had been read: not again where they were kept. Two documents stand behind each amount.
    done = (0, 0, 0, 100, 100, 200)[after] * INGEST_COST if with_folder else 0.0
    # What is scored takes several calls; so does what is read.
    a_row = 128 * INGEST_COST + 48
    assert units == pytest.approx(all_of_it - after * a_row - done)
    assert folder is None or not folder.exists()


@pytest.mark.slow
def test_a_memory_of_other_weights_or_a_damaged_one_is_read_again(lm, tmp_path):
    documents = _documents(5, 200)
    others = torch.as_tensor(select_distractors(documents, documents[:2], CONFIG))
    texts = [(d.name, torch.as_tensor(d.ids[:128]), torch.as_tensor(d.ids[128:177])) for d in documents[:2]]

    def losses(folder, done=()):
        return [
            row["blocks"] for row in measure_distraction(lm, "exact", texts, others, [0, 100], folder=folder, done=done)
        ]

    whole = losses(None)
    folder = tmp_path / "memory"
    lm.ingest(torch.full((1, 100), 7), memory=lm.new_memory()).save(folder)
    (folder / "memory.json").write_text("{}")
    assert losses(folder) == whole
    # Of another amount than any that is asked for.
    lm.ingest(torch.full((1, 64), 7), memory=lm.new_memory()).save(folder)
    assert losses(folder) == whole


@pytest.mark.slow
def test_an_evaluation_killed_within_the_phase_goes_on_in_it(lm, tmp_path):
    documents = _documents(5, 200)
    others = select_distractors(documents, documents[:2], CONFIG)
    tokenizer = load_tokenizer("tiny-random-llama")
    kept, seen = {}, []

    def keep(name, record):
        kept[name] = json.loads(json.dumps(record))
        seen.append(name)
        if seen.count("multi-doc: exact (so far)") == 3:
            raise Killed

    with pytest.raises(Killed):
        evaluate(lm, tokenizer, documents[:2], CONFIG, distractors=others, on_result=keep, scratch=tmp_path / "scratch")
    assert len(kept["multi-doc: exact (so far)"]) == 3
    assert (tmp_path / "scratch").is_dir()
    before = list(seen)
    again = evaluate(
        lm, tokenizer, documents[:2], CONFIG, distractors=others, on_result=keep, done=dict(kept),
        scratch=tmp_path / "scratch",
    )  # fmt: skip
    assert seen[len(before) :] == ["multi-doc: exact (so far)"] * 3 + ["multi-doc: exact"]
    whole = evaluate(lm, tokenizer, documents[:2], CONFIG, distractors=others)
    for ours, theirs in zip(again["multi_doc"], whole["multi_doc"], strict=True):
        assert {key: ours[key] for key in ("nll", "own_share", "distractor_tokens")} == {
            key: theirs[key] for key in ("nll", "own_share", "distractor_tokens")
        }
    assert not (tmp_path / "scratch").exists()


def test_passkeys_are_counted_by_depth():
    record = [
        {"context_tokens": 512, "depth": depth, "correct": correct, "key_in_window": False, "index_used": None}
        for depth, correct in ((0.0, True), (0.1, False), (0.5, True), (1.0, False))
    ]
    config = EvaluationConfig(context_tokens=[], passkey_tokens=[512])
    rows = summarise({"passkey: exact": record}, config, "exact")["passkey_depths"]
    assert [(row["depth"], row["accuracy"], row["n"]) for row in rows] == [(0.0, 0.5, 2), (0.4, 1.0, 1), (0.8, 0.0, 1)]
    table = depths({"passkey_depths": rows})
    assert [row[1].text for row in table.rows] == ["from 0%", "from 40%", "from 80%"]


def test_other_documents_can_come_from_other_files(tmp_path: Path) -> None:
    for name, letter, texts in (("code", "c", 3), ("books", "b", 1)):
        (tmp_path / name).mkdir()
        for number in range(texts):
            (tmp_path / name / f"{number}.txt").write_text(letter * 50)
    tokens = {"min_tokens": 8, "max_document_tokens": 40}  # others are read whole
    data = CrossbatchDataModule(tokenizer="tiny-random-llama", cache_dir=str(tmp_path), **tokens)
    paths = [str(tmp_path / "code"), str(tmp_path / "books")]
    documents = list(data.other_documents(paths, "evaluation.distractor_paths"))
    assert [(document.text[0], len(document)) for document in documents] == [(one, 50) for one in "cbcc"]
    config = replace(CONFIG, distractor_tokens=[90], distractor_paths=paths)
    taken = select_distractors(iter(documents), documents[1:2], config)  # what is scored is left out
    assert data.tokenizer_object.decode(taken) == "c" * 90
    with pytest.raises(SettingError, match=r"distractor_tokens.*distractor_paths have 200 tokens.*name more paths"):
        select_distractors(documents, [], replace(config, distractor_tokens=[201]))
    with pytest.raises(SettingError, match="no such"):
        list(data.other_documents(["no such"], "evaluation.distractor_paths"))
    with pytest.raises(SettingError, match=r"distractor_paths=\['x'\]: are of no use without distractor_tokens"):
        EvaluationConfig(distractor_paths=["x"])


def test_too_few_other_documents_are_named():
    documents = _documents(3, 150)
    with pytest.raises(SettingError, match=r"distractor_tokens.*150 tokens"):
        select_distractors(documents, documents[:2], CONFIG)
    with pytest.raises(SettingError, match="context_tokens"):
        EvaluationConfig(context_tokens=[], distractor_tokens=[5])
    with pytest.raises(SettingError, match="below 1"):
        EvaluationConfig(distractor_tokens=[0])
