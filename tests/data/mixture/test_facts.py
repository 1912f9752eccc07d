"""What documents of facts and of quotations hold, read back from their ids by a tokenizer of bytes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot import CrossbatchDataModule
from lightning_fot.config.sources import FactsSettings, RecallSettings, read_sources
from lightning_fot.data.mixture.fact_templates import RELATIONS, with_name
from lightning_fot.data.mixture.facts import CUE_TOKENS, FactsSource, RecallSource, draw_facts
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError
from tests.support.byte_tokenizer import EOS, FIRST, ByteTokenizer

TOKENS, ASK = 4096, 2048


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("books") / "book.txt"
    file.write_text(" ".join(f"w{number}" for number in range(20_000)))
    return file


def facts_source(book: Path, seed: int = 3, **given: Any) -> FactsSource:
    chosen = {"tokens": TOKENS, "ask_tokens": ASK, "paths": [str(book)], **given}
    return FactsSource(FactsSettings(setting="data.sources[0]", **chosen), TextEncoder(ByteTokenizer()), seed)


def recall_source(book: Path, **given: Any) -> RecallSource:
    chosen = {"tokens": 1024, "ask_tokens": 512, "paths": [str(book)], "quote_tokens": 64, **given}
    return RecallSource(RecallSettings(setting="data.sources[0]", **chosen), TextEncoder(ByteTokenizer()), 3)


def read(source: FactsSource | RecallSource, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    documents = itertools.islice(source.documents(0), count)
    return [document.read(0, len(document)) for document in documents]  # type: ignore[misc]


def answers(ids: np.ndarray, targets: np.ndarray) -> list[tuple[str, str]]:
    """(what stands before an answer in its sentence, the answer) of each stretch of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], targets.astype(int), [0]])))
    decode = ByteTokenizer().decode
    found = []
    for start, stop in edges.reshape(-1, 2):
        found.append((decode(ids[:start].tolist()), decode(ids[start:stop].tolist())))
    return found


def test_every_answer_was_told_in_the_windows_before_the_questions(book: Path) -> None:
    for ids, targets in read(facts_source(book), 12):
        told = ByteTokenizer().decode(ids[: TOKENS - ASK].tolist())
        found = answers(ids, targets)
        assert len(ids) == len(targets) == TOKENS
        assert found
        assert not targets[: TOKENS - ASK].any()
        for _, answer in found:
            assert answer in told


def test_asked_in_told_words_the_question_is_the_sentence_that_told(book: Path) -> None:
    for ids, targets in read(facts_source(book, other_words=0.0), 12):
        told = ByteTokenizer().decode(ids[: TOKENS - ASK].tolist())
        for before, answer in answers(ids, targets):
            # The question goes back to the last line or sentence end; its last words and the answer were told so.
            assert before[-12:] + answer in told


def test_asked_in_other_words_no_question_repeats_its_sentence(book: Path) -> None:
    repeated = total = 0
    for ids, targets in read(facts_source(book, other_words=1.0), 12):
        told = ByteTokenizer().decode(ids[: TOKENS - ASK].tolist())
        for before, answer in answers(ids, targets):
            repeated += before[-25:] + answer in told
            total += 1
    assert total > 60
    assert repeated == 0


class ChatTokenizer(ByteTokenizer):
    """Bytes, and a chat template whose turns end with the end token, written as an apostrophe that no fact has."""

    chat_template = "turns"
    all_special_ids = (EOS,)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": [EOS if one == ord("\x03") + FIRST else one for one in ids]}

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **_: Any) -> str:
        turns = "".join(f"<{one['role']}>{one['content']}\x03\n" for one in messages)
        return turns + "<assistant>" * add_generation_prompt


def chat_source(book: Path, tokenizer: ByteTokenizer, share: float) -> FactsSource:
    chosen = FactsSettings(setting="data.sources[0]", tokens=TOKENS, ask_tokens=ASK, paths=[str(book)], chat=share)
    return FactsSource(chosen, TextEncoder(tokenizer), 3)


def test_a_user_asks_an_assistant_and_the_loss_counts_answers_and_their_ends(book: Path) -> None:
    total = 0
    for ids, targets in read(chat_source(book, ChatTokenizer(), 1.0), 12):
        told = ByteTokenizer().decode(ids[: TOKENS - ASK].tolist())
        assert not targets[: TOKENS - ASK].any()
        for before, answer in answers(ids, targets):
            assert before.endswith("?\n<assistant>")
            # A preposition may stand before the value, as in "In the hall".
            assert any(answer[cut:].strip() in told for cut in range(min(8, len(answer))))
            total += 1
        ends = np.flatnonzero(targets & (ids == EOS))
        assert len(ends) == len(answers(ids, targets))
    assert total > 40


def test_a_share_of_the_documents_is_a_dialogue(book: Path) -> None:
    asked = [
        "<user>" in ByteTokenizer().decode(ids.tolist()) for ids, _ in read(chat_source(book, ChatTokenizer(), 0.5), 40)
    ]
    assert 8 < sum(asked) < 32


def test_a_dialogue_needs_a_chat_template(book: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.chat.*needs a tokenizer with a chat template"):
        chat_source(book, ByteTokenizer(), 0.5)


def test_no_name_is_told_twice_in_documents_that_are_read_together() -> None:
    documents = draw_facts(4, 12, 2, 5)
    told = [fact.told for facts in documents for fact in facts]
    assert len(told) == 48
    assert len(set(told)) == 48


def test_facts_of_a_document_differ_in_their_names_alone() -> None:
    facts = draw_facts(1, 12, 1, 8)[0]
    # With the words that all have in common taken out, most sentences are a name.
    common = Counter(word for fact in facts for word in set(re.findall(r"\w+", fact.told)))
    assert max(common.values()) >= 8


def test_names_have_their_place_in_every_sentence() -> None:
    for relation in RELATIONS:
        for frame in (*relation.told, *relation.asked):
            said = with_name(frame, "the Name")
            assert re.search("[Tt]he Name", said), frame
            assert "{" not in said, frame
            assert said[0] == said[0].upper(), frame
            assert not said.endswith(" "), frame
        assert not set(relation.told) & set(relation.asked)


def test_nothing_of_the_benchmark_is_trained_on() -> None:
    text = " ".join(frame for relation in RELATIONS for frame in (*relation.told, *relation.asked)).lower()
    for word in ("secret", "silver", "ferry", "boat", "baker", "bread in"):
        assert word not in text


@given(seed=st.integers(0, 2**31), other=st.sampled_from([0.0, 0.5, 1.0]), facts=st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_a_document_is_a_function_of_seed_and_number(book: Path, seed: int, other: float, facts: int) -> None:
    first = facts_source(book, seed, other_words=other, facts=facts)
    second = facts_source(book, seed, other_words=other, facts=facts)
    late = list(itertools.islice(second.documents(0), 11))[10]
    ids, targets = list(itertools.islice(first.documents(0), 11))[10].read(0, TOKENS)
    again, marked = late.read(0, TOKENS)
    assert (ids == again).all()
    assert targets is not None
    assert marked is not None
    assert (targets == marked).all()


def test_facts_grow_from_the_first_number_to_the_last(book: Path) -> None:
    source = facts_source(book, facts=[2, 12], grow_documents=40, together=4)
    counts = [len(answers(ids, targets)) for ids, targets in read(source, 60)]
    assert counts[:4] == [2] * 4
    assert min(counts[-16:]) >= 10


def test_held_out_documents_are_others(book: Path) -> None:
    source = facts_source(book)
    trained = [document.read(0, TOKENS)[0].tobytes() for document in itertools.islice(source.documents(0), 8)]
    held = [document.read(0, TOKENS)[0].tobytes() for document in source.heldout()]
    assert held
    assert not set(trained) & set(held)


def test_quotations_repeat_what_was_read_and_their_beginnings_do_not_count(book: Path) -> None:
    for ids, targets in read(recall_source(book), 6):
        before = ids[:512].tobytes()
        assert not targets[:513].any()
        # The first half goes on with the text, the second is four quotations of 64 tokens.
        assert targets[513:768].all()
        for start in range(768, 1024, 64):
            quotation = ids[start : start + 64]
            assert quotation.tobytes() in before
            assert not targets[start : start + CUE_TOKENS].any()
            assert targets[start + CUE_TOKENS : start + 64].all()


def test_the_windows_that_tell_have_nothing_to_predict(book: Path) -> None:
    """In layout ``paper`` a batch without targets costs nothing, so no target may lie on their border."""
    sources = [
        {"kind": "facts", "tokens": 1024, "ask_tokens": 512, "paths": [str(book)], "weight": 2},
        {"kind": "recall", "tokens": 1024, "ask_tokens": 512, "paths": [str(book)]},
    ]
    data = CrossbatchDataModule(sources=sources, window=512, batch_size=4, layout="paper", prev_windows=1)
    data.tokenizer_object = ByteTokenizer()
    data.report = lambda message: None
    for step in range(6):
        batch = data.train_batch(step)
        counted = (batch["targets"] != -100).sum(1).tolist()
        assert all(counted) if step % 2 else not any(counted)


def test_whole_documents_of_recall_count_from_their_second_token(book: Path) -> None:
    counts = [int(targets.sum()) for _, targets in read(recall_source(book, whole=1.0), 4)]
    assert counts == [1023 - 4 * CUE_TOKENS] * 4


@pytest.mark.parametrize(
    ("kind", "given", "match"),
    [
        ("facts", {"tokens": 256, "ask_tokens": 200}, r"ask_tokens=200: leaves fewer than 64 of 256.*Lower it"),
        ("facts", {"facts": [0, 3]}, r"facts=\[0, 3\]: must be two whole numbers"),
        ("facts", {"facts": "many"}, r"facts='many': must be two whole numbers"),
        ("facts", {"relations": [4, 1]}, r"relations=\[4, 1\]: must go from"),
        ("facts", {"other_words": 1.5}, r"other_words=1\.5: must be a share"),
        ("facts", {"together": 0}, r"together=0: must be a whole number of at least 1"),
        ("recall", {"quote_tokens": 200}, r"quote_tokens=200: is more than half"),
        ("recall", {"whole": 2}, r"whole=2: must be a share"),
        ("recall", {"quote_tokens": 8}, r"quote_tokens=8: must be a whole number of at least 16"),
    ],
)
def test_settings_that_cannot_work_are_named(kind: str, given: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        read_sources([{"kind": kind, **given}])


def test_too_little_text_is_said(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.paths=.*has 9 of 2,048 tokens.*Add more text"):
        recall_source(file)
