"""Passages that a question attends to are read once more before it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_fot import Memory, MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.library.answering import Answerer, AnswerSettings, quoting_of
from lightning_fot.library.quotes import LENGTH, NEUTRAL, Quoting, find_quotes, with_quotes
from lightning_fot.memory.passages import Passage
from lightning_fot.memory.windows import AskedWords
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone, load_tokenizer

CONFIG = MemoryConfig(memory_layers=[1, 3], window=64, top_k=6, overlap=8, sink_tokens=1)
NEWLINE = [13]  # a byte each, behind three ids of its own


@pytest.fixture(scope="module")
def read() -> Iterator[tuple[MemoryLM, Memory]]:
    with attach_memory(load_backbone("tiny-random-llama"), CONFIG) as lm:
        memory = lm.new_memory()
        for name, seed in (("first", 0), ("second", 1)):
            ids = torch.randint(3, 250, (1, 150), generator=torch.Generator().manual_seed(seed))
            lm.ingest(ids, memory, document=name)
        yield lm, memory


PROMPT = list(range(40, 55))


def _are_around(quotes: list[Passage], found: list[Passage], length: int) -> None:
    """Each quote holds what was found, in the order of the text, is as long as it may be, and reaches into no other."""
    ordered = sorted(found, key=lambda one: (one.document.number, one.start))
    assert len(quotes) == len(ordered)
    for quote, one in zip(quotes, ordered, strict=True):
        assert quote.document == one.document
        assert quote.start <= one.start < one.stop <= quote.stop
        assert len(quote.token_ids) == quote.stop - quote.start <= length
    for quote, following in pairwise(quotes):
        assert quote.document != following.document or quote.stop <= following.start
    for number, quote in enumerate(quotes):
        beside = [other for other in quotes[max(0, number - 1) : number + 2] if other.document == quote.document]
        room = sum(other.stop - other.start for other in beside) < quote.document.tokens
        touches = any(quote.stop == other.start or quote.start == other.stop for other in beside)
        assert quote.stop - quote.start == length or touches or not room


def test_quotes_of_one_document_end_where_others_begin(read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    first = memory.log.documents[0].number
    spelling = torch.arange(lm.vocabulary + 1)
    near = [memory.log.tokens(first, at, at + 5) for at in (0, 60, 68, 145)]
    quoting = Quoting(PROMPT, AskedWords(spelling, torch.cat(near)))
    found = find_quotes(lm, PROMPT, memory, 4, 9, quoting)
    assert len(found) == 4
    assert (found[0].start, found[-1].stop) == (0, 150)
    assert [quote.stop - quote.start for quote in found].count(9) >= 2
    assert found[1].stop <= found[2].start
    assert {place for quote in found for place in range(quote.start, quote.stop)} >= {*range(60, 65), *range(68, 73)}


def test_they_are_what_the_prompt_attends_to_in_the_order_of_the_text(read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    with torch.no_grad(), lm.record_attention() as trace:
        lm(torch.tensor([PROMPT]), memory=memory)
    wanted = trace.passages(memory, length=10, top=3)
    found = find_quotes(lm, PROMPT, memory, 3, length=15)
    _are_around(found, wanted, 15)
    ids = with_quotes(PROMPT, found, NEWLINE)
    assert ids[: 1 + len(found[0].token_ids)] == [*NEWLINE, *found[0].token_ids.tolist()]
    assert ids[-16:] == [*NEWLINE, *PROMPT]
    assert len(ids) == len(PROMPT) + 1 + sum(1 + len(quote.token_ids) for quote in found)
    # What was read stays as it was.
    assert memory.tokens_seen.tolist() == [300]


def test_what_a_neutral_prompt_attends_to_is_taken_off(read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    neutral = list(range(90, 99))
    traces = []
    for ids in (PROMPT, neutral):
        with torch.no_grad(), lm.record_attention() as trace:
            lm(torch.tensor([ids]), memory=memory)
        traces.append(trace)
    wanted = traces[0].passages(memory, length=10, top=3, against=traces[1])
    found = find_quotes(lm, PROMPT, memory, 3, 15, Quoting(neutral))
    _are_around(found, wanted, 15)
    # A prompt has nothing beyond itself.
    assert find_quotes(lm, PROMPT, memory, 3, 10, Quoting(PROMPT)) == []


def test_rare_words_of_the_question_are_found_where_attention_sees_nothing(read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    second = memory.log.documents[1].number
    wanted = memory.log.tokens(second, 70, 74)
    spelling = torch.arange(lm.vocabulary + 1)
    # Against itself, a prompt attends to nothing.
    quoting = Quoting(PROMPT, AskedWords(spelling, wanted))
    found = find_quotes(lm, PROMPT, memory, 1, 10, quoting)
    assert [quote.document.name for quote in found] == ["second"]
    assert found[0].start <= 70
    assert found[0].stop >= 74
    assert (found[0].mass >= 0, found[0].lift) == (True, 0.0)


@pytest.mark.parametrize(
    ("count", "length", "expected"), [(0, 10, 0), (9, 10, 6), (5, 47, 1), (2, 72, 0), (2, 71, 1), (900, 1, 24)]
)
def test_no_more_than_the_window_has_room_for(
    count: int, length: int, expected: int, read: tuple[MemoryLM, Memory]
) -> None:
    lm, memory = read
    found = find_quotes(lm, PROMPT, memory, count, length)
    assert len(found) == expected
    assert len(with_quotes(PROMPT, found, NEWLINE)) <= CONFIG.window
    # A line break may be several tokens.
    wide = find_quotes(lm, PROMPT, memory, count, length, between=3)
    assert len(with_quotes(PROMPT, wide, [*NEWLINE, *NEWLINE, *NEWLINE])) <= CONFIG.window


def test_what_was_stored_without_its_tokens_is_not_quoted(read: tuple[MemoryLM, Memory]) -> None:
    lm, _ = read
    memory = lm.new_memory()
    generator = torch.Generator().manual_seed(2)
    shapes = {number: (1, layer.kv_heads, 30, layer.key_dim) for number, layer in memory.layers.items()}
    pairs = {number: (torch.randn(shape, generator=generator),) * 2 for number, shape in shapes.items()}
    memory.append(pairs)
    assert find_quotes(lm, PROMPT, memory, 2, 10) == []
    tokenizer = load_tokenizer("tiny-random-llama")
    for quotes in (0, 2):
        answer = Answerer(lm, tokenizer, memory, AnswerSettings(max_new_tokens=3, quotes=quotes)).ask("Which?")
        assert answer.passages is not None
        assert {passage.text for passage in answer.passages} == {""}


@pytest.mark.parametrize("name", ["count", "length", "between"])
@pytest.mark.parametrize("value", [-1, True, "2", 2.5, None])
def test_numbers_that_are_none_are_told(name: str, value: Any, read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    with pytest.raises(SettingError, match="must be a whole number"):
        find_quotes(lm, PROMPT, memory, **{"count": 2, "length": 10, name: value})


def test_of_an_empty_memory_there_are_none_and_of_two_rows_it_is_not_known_which(
    read: tuple[MemoryLM, Memory],
) -> None:
    lm, _ = read
    assert find_quotes(lm, PROMPT, lm.new_memory(), 2, 10) == []
    assert with_quotes(PROMPT, [], NEWLINE) == PROMPT
    with pytest.raises(SettingError, match="is not one row"):
        find_quotes(lm, PROMPT, lm.new_memory(2), 2, 10)
    with pytest.raises(SettingError, match="quotes=-1"):
        find_quotes(lm, PROMPT, lm.new_memory(), -1, 10)


def test_an_answer_is_that_of_generate_behind_the_quotes() -> None:
    tokenizer = load_tokenizer("tiny-random-llama")
    tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }}|{% endfor %}"
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def ids_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def words(text: str) -> str:
        # Random weights say spaces of all kinds, of which an answer begins with none.
        return "".join(text.split())

    # A window with room for two quotes.
    config = replace(CONFIG, window=240)
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        text = "".join(f"The code of door {number} is {number * 37}. " for number in range(20))
        memory = lm.ingest(torch.tensor([ids_of(text)]), lm.new_memory())

        def direct(prompt: list[int], quotes: int, neutral: str = f"{NEUTRAL}|", question: str = "Who?") -> str:
            quoting = quoting_of(tokenizer, ids_of(question), ids_of(neutral))
            behind = with_quotes(prompt, find_quotes(lm, prompt, memory, quotes, quoting=quoting), newline)
            assert len(behind) == len(prompt) + (LENGTH + 1) * quotes + (quotes > 0)
            out = lm.generate(
                torch.tensor([behind]), memory, max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )
            return words(tokenizer.decode(out[0, len(behind) :], skip_special_tokens=True))

        def asked(**settings: Any) -> Answerer:
            return Answerer(lm, tokenizer, memory, AnswerSettings(max_new_tokens=16, passages=0, **settings))

        # As many as the model is asked with, where nothing is said.
        assert words(asked().ask("Who?").text) == direct(ids_of("Who?|"), 0)
        assert words(asked(quotes=1).ask("Who?").text) == direct(ids_of("Who?|"), 1)
        tokenizer.answer_quotes = 2
        answerer = asked()
        first = answerer.ask("Who?")
        assert words(first.text) == direct(ids_of("Who?|"), 2)
        assert first.prompt_tokens == len(ids_of("Who?|"))
        # The next question has quotes of its own alone.
        assert words(answerer.ask("Why?").text) == direct(
            ids_of(f"Who?|{first.text}|Why?|"), 2, f"Who?|{first.text}|{NEUTRAL}|", "Why?"
        )
        assert words(asked(quotes=0).ask("Who?").text) == direct(ids_of("Who?|"), 0)
        # A text that is continued as it is has none.
        assert words(asked(raw=True).ask("Who?").text) == direct(tokenizer("Who?")["input_ids"][:-1], 0)
