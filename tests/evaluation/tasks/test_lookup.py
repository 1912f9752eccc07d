"""Facts in a text: what the task promises, and that its scores are those of plain forwards."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fot import EvaluationConfig, attach_memory
from lightning_fot.config.tasks import MOST_FACTS, LookupTask
from lightning_fot.data.mixture.fact_templates import RELATIONS
from lightning_fot.data.mixture.facts import draw_facts
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.plan import SO_FAR, plan
from lightning_fot.evaluation.tasks.lookup import Lookup, as_answer, same_answers
from lightning_fot.evaluation.tasks.parts import facts as parts
from lightning_fot.evaluation.tasks.parts.episode import Probe
from lightning_fot.evaluation.tasks.parts.facts import make_facts, sentences_of
from lightning_fot.evaluation.tasks.parts.texts import select_texts
from lightning_fot.pretrained import load_backbone
from lightning_fot.report.content.task_tables import found
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fast_tokenizer import byte_level
from tests.support.models import settings

NOTHING_ELSE: dict[str, Any] = {"context_tokens": [], "passkey_tokens": []}
TOKENIZERS = [ByteTokenizer(), ByteTokenizer(prefix=True), byte_level()]
BOOK = " ".join(f"In chapter {n} nothing of note was said.\nIt rained {n} times!" for n in range(120))


def document(tokenizer: Any, text: str = BOOK) -> SimpleNamespace:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    return SimpleNamespace(name="book", ids=ids)


def asked(tokenizer: Any, probe: Probe) -> tuple[str, str]:
    ((start, stop),) = probe.answers
    assert stop == len(probe.ids)
    return str(tokenizer.decode(probe.ids[:start].tolist())), str(tokenizer.decode(probe.ids[start:].tolist()))


@pytest.fixture(scope="module")
def lm():
    with attach_memory(load_backbone("tiny-random-llama"), settings(window=64)) as lm:
        yield lm


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_each_fact_is_told_once_at_its_depth_in_the_users_text(tokenizer: Any) -> None:
    task = LookupTask(tokens=[1500, 4000], facts=8)
    make = Lookup(task, tokenizer, [document(tokenizer)])
    for length in task.tokens:
        told, other = make.episodes(length)
        assert (told.asked, other.asked) == ("told", "other")
        assert np.array_equal(told.context, other.context)
        assert length - 60 <= len(told.context) <= length
        start = 1 if told.context[0] == tokenizer.bos_token_id else 0
        text = str(tokenizer.decode(told.context[start:].tolist()))
        rest, depths = text, []
        for one, again in zip(told.probes, other.probes, strict=True):
            (question, answer), (in_other_words, same) = asked(tokenizer, one), asked(tokenizer, again)
            assert answer == same
            statement = f"{question.strip()}{answer}."
            assert text.count(statement) == 1
            assert in_other_words.strip() not in text
            depths.append(text.index(statement) / len(text))
            rest = rest.replace(f" {statement}", "")
        # What is left is the beginning of the user's text, as one line.
        assert BOOK.replace("\n", " ").startswith(rest.strip())
        assert np.allclose(sorted(depths), (np.arange(8) + 0.5) / 8, atol=0.08)


def test_within_a_kind_names_alone_tell_facts_apart() -> None:
    facts = make_facts(MOST_FACTS, 5)
    assert len({fact.statement for fact in facts}) == len({fact.told for fact in facts}) == MOST_FACTS
    for _, group in itertools.groupby(sorted(facts, key=lambda fact: fact.group), key=lambda fact: fact.group):
        alike = list(group)
        assert len(alike) == 12
        common = set.intersection(*(set(re.findall(r"\w+", fact.told)) for fact in alike))
        assert all(len(set(re.findall(r"\w+", fact.told)) - common) == 1 for fact in alike)


def test_names_and_sentences_are_none_that_are_trained_on() -> None:
    trained = {fact.told for seed in range(40) for facts in draw_facts(4, 12, 8, seed) for fact in facts}
    words = set(re.findall(r"\w+", " ".join(trained)))
    assert not words & {*parts.ISLANDS, *parts.VILLAGES}
    frames = " ".join(frame for relation in RELATIONS for frame in (*relation.told, *relation.asked))
    for start in ("secret code of", "hides the silver key", "ferry to", "baker is called", "unlocks the door in"):
        assert start not in frames


def test_stretches_without_an_end_are_cut() -> None:
    sentences = sentences_of("word " * 2000 + "x" * 5000)
    assert max(map(len, sentences)) <= 2000
    assert "".join(sentences).replace(" ", "") == "word" * 2000 + "x" * 5000


def test_answers_end_where_a_sentence_or_a_line_does() -> None:
    assert [as_answer(said) for said in (" 7:30. The", " old barn\nA", " Singh, who", "\n", " 12345")] == [
        "7:30",
        "old barn",
        "Singh",
        "",
        "12345",
    ]


def test_one_answer_to_all_is_told_from_many() -> None:
    one = same_answers(["a"] * 5 + ["b"], [True] + [False] * 5)
    assert one == {"distinct_wrong": 2, "commonest": 5, "commonest_answer": "a"}
    assert same_answers(["a", "b", "c"], [True, True, True])["distinct_wrong"] == 0
    assert same_answers(["a", "b", "c"], [False, False, False]) == {
        "distinct_wrong": 3,
        "commonest": 1,
        "commonest_answer": "a",
    }


def _said(logits_of: Any, question: list[int], tokens: int) -> list[int]:
    """Greedy decoding, each step from the start."""
    said: list[int] = []
    for _ in range(tokens):
        said.append(int(logits_of([*question, *said])[-1].argmax()))
    return said


@pytest.mark.slow
@torch.no_grad()
def test_rows_are_those_of_plain_forwards(lm) -> None:
    tokenizer = ByteTokenizer()
    config = EvaluationConfig(**NOTHING_ELSE, lookup={"tokens": [500, 900], "facts": 3, "full_context_tokens": 600})
    texts = {"lookup": [document(tokenizer)]}
    records: dict[str, Any] = {}
    results = evaluate(lm, tokenizer, [], config, texts=texts, on_result=records.__setitem__)
    assert [name for name in records if not name.endswith(SO_FAR)] == [name for name, _ in plan(config, "exact", 64)]
    # The text is read once for both ways of asking, but for the end that filled no window.
    first, second = records["lookup: exact, 900 tokens"]
    assert first["read_tokens"] > 800
    assert second["read_tokens"] < 64
    rows = {(row["memory"], row["context_tokens"], row["asked"]): row for row in results["lookup"]}
    lengths = {"none": [500, 900], "exact": [500, 900], "full_context": [500]}
    assert set(rows) == {(kind, n, asked) for kind in lengths for n in lengths[kind] for asked in ("told", "other")}
    make = Lookup(config.lookup, tokenizer, texts["lookup"])
    plain = load_backbone("tiny-random-llama")
    for (kind, length, way), row in rows.items():
        (episode,) = [one for one in make.episodes(length) if one.asked == way]
        context = episode.context.tolist()

        held = lm.new_memory()
        if kind == "exact":
            lm.ingest(torch.tensor([context]), held)

        def logits_of(ids: list[int], kind: str = kind, context: list[int] = context, held: Any = held) -> torch.Tensor:
            if kind == "full_context":
                return plain(torch.tensor([context + ids])).logits[0, len(context) :]
            return lm(torch.tensor([ids]), memory=held).logits[0]

        nats, said, right = [], [], []
        for probe in episode.probes:
            ((start, stop),) = probe.answers
            ids = probe.ids.tolist()
            logits = logits_of(ids)[start - 1 : stop - 1]
            nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:stop]))))
            decoded = _said(logits_of, ids[:start], probe.say)
            right.append(decoded[: stop - start] == ids[start:stop])
            said.append(as_answer(tokenizer.decode(ids[start:] if right[-1] else decoded)))
        assert row["n"] == 3
        assert row["correct"] == sum(right)
        assert row["nll"] == pytest.approx(np.mean(nats), abs=1e-4), (kind, length, way)
        wrong = {one for one, good in zip(said, right, strict=True) if not good}
        assert row["distinct_wrong"] == len(wrong)
        assert row["commonest"] == max(map(said.count, said))
    (table,) = [one for one in found(results) if one.title.startswith("Facts told apart")]
    assert table.columns == ("memory", "words", "answers", "500", "900")
    shown = {(row[0].text, row[1].text, row[2].text): row[3:] for row in table.rows}
    assert len(shown) == 3 * 2 * 3
    assert shown["full context", "told", "right"][1].raw is None
    assert shown["exact search", "other", "commonest answer"][0].raw == rows["exact", 500, "other"]["commonest"]


@pytest.mark.slow
@torch.no_grad()
def test_what_was_asked_is_not_asked_again(lm) -> None:
    config = EvaluationConfig(**NOTHING_ELSE, lookup=LookupTask(tokens=[700], facts=3, full_context_tokens=0))
    texts = {"lookup": [document(ByteTokenizer())]}
    seen: dict[str, Any] = {}

    def stop_after_the_first_part(name: str, rows: Any) -> None:
        seen[name] = [dict(row) for row in rows]
        if name == f"lookup: exact, 700 tokens{SO_FAR}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, ByteTokenizer(), [], config, texts=texts, on_result=stop_after_the_first_part)
    done = {name: rows for name, rows in seen.items() if not (name.startswith("lookup: no memory") and SO_FAR in name)}
    done[f"lookup: exact, 700 tokens{SO_FAR}"][0]["said"] = ["kept"] * 3
    rows = evaluate(lm, ByteTokenizer(), [], config, texts=texts, done=done)["lookup"]
    (told,) = [row for row in rows if (row["memory"], row["asked"]) == ("exact", "told")]
    assert told["commonest_answer"] == "kept"
    assert len(rows) == 4


@pytest.mark.slow
@torch.no_grad()
def test_longer_than_its_positions_the_backbone_is_left_out() -> None:
    backbone = load_backbone("tiny-random-llama")
    backbone.config.max_position_embeddings = 720
    config = EvaluationConfig(**NOTHING_ELSE, lookup=LookupTask(tokens=[600, 700], facts=3))
    with attach_memory(backbone, settings(window=64)) as lm:
        tokenizer = ByteTokenizer()
        rows = evaluate(lm, tokenizer, [], config, texts={"lookup": [document(tokenizer)]})["lookup"]
    assert [row["context_tokens"] for row in rows if row["memory"] == "full_context"] == [600, 600]


def test_what_cannot_work_is_named(lm) -> None:
    texts = {"lookup": [document(ByteTokenizer())]}
    for given, message in (
        ({"facts": 49}, r"evaluation\.lookup\.facts=49: are told apart by 48 names"),
        ({"facts": 0}, r"lookup\.facts=0: must be a whole number of at least 1"),
        ({"paths": []}, r"lookup\.paths=\[\]: must be a list of files"),
        ({"paths": "books"}, r"lookup\.paths='books': must be a list of files"),
        ({"full_context_tokens": -1}, r"lookup\.full_context_tokens=-1: must be a whole number"),
        ({"tokens": [300]}, r"lookup\.tokens=\[300\]: 300 is less than twice what 24 facts take, \d+ tokens"),
        ({"tokens": [4000, 99_000]}, r"lookup\.tokens=.*: 99000 is more than the text has, [\d,]+ tokens.*Use fewer"),
    ):
        with pytest.raises(SettingError, match=message):
            evaluate(lm, ByteTokenizer(), [], EvaluationConfig(**NOTHING_ELSE, lookup=given), texts=texts)


def test_text_comes_from_the_paths_as_far_as_it_is_needed() -> None:
    given: list[Any] = []
    books = [document(ByteTokenizer(), BOOK[:3000]) for _ in range(5)]

    def others(paths: Any, setting: str) -> Any:
        given.append((paths, setting))
        return iter(books)

    task = LookupTask(tokens=[4000], paths=["books"])
    taken = select_texts([task], 64, lambda tokens, limit: [], others)["lookup"]
    assert given == [(["books"], "evaluation.lookup.paths")]
    assert len(taken) == 3


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_finds_facts_in_its_own_context(repository: Path) -> None:
    from lightning_fot.pretrained import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    text = (repository / "docs" / "concepts.md").read_text(encoding="utf-8")
    config = EvaluationConfig(**NOTHING_ELSE, lookup=LookupTask(tokens=[768], facts=8))
    with attach_memory(load_backbone("smollm2-135m"), settings(memory_layers=[18], window=256, top_k=32)) as lm:
        rows = evaluate(lm, tokenizer, [], config, texts={"lookup": [document(tokenizer, text)]})["lookup"]
    losses = {(row["memory"], row["asked"]): row["nll"] for row in rows}
    right = {(row["memory"], row["asked"]): row["correct"] for row in rows}
    assert right["full_context", "told"] > right["none", "told"]
    assert losses["full_context", "told"] + 1 < losses["none", "told"]
    assert losses["full_context", "other"] < losses["none", "other"]
