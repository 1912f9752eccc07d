"""Passages that a question attends to are read once more before it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_fot import Memory, MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.library.answering import Answerer, AnswerSettings, quoting_of
from lightning_fot.library.quotes import NEUTRAL, Quoting, find_quotes, with_quotes
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


def test_they_are_what_the_prompt_attends_to_in_the_order_of_the_text(read: tuple[MemoryLM, Memory]) -> None:
    lm, memory = read
    with torch.no_grad(), lm.record_attention() as trace:
        lm(torch.tensor([PROMPT]), memory=memory)
    wanted = trace.passages(memory, length=10, top=3)
    found = find_quotes(lm, PROMPT, memory, 3, length=10)
    places = [(quote.document.number, quote.start, quote.stop) for quote in found]
    assert places == sorted((one.document.number, one.start, one.stop) for one in wanted)
    ids = with_quotes(PROMPT, found, NEWLINE)
    assert ids[:11] == [*NEWLINE, *found[0].token_ids.tolist()]
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
    found = find_quotes(lm, PROMPT, memory, 3, 10, Quoting(neutral))
    places = [(quote.document.number, quote.start, quote.stop) for quote in found]
    assert places == sorted((one.document.number, one.start, one.stop) for one in wanted)
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
    ("count", "length", "expected"), [(0, 10, 0), (9, 10, 4), (5, 47, 1), (2, 48, 0), (900, 1, 24)]
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
    config = replace(CONFIG, window=160)
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        text = "".join(f"The code of door {number} is {number * 37}. " for number in range(20))
        memory = lm.ingest(torch.tensor([ids_of(text)]), lm.new_memory())

        def direct(prompt: list[int], quotes: int, neutral: str = f"{NEUTRAL}|", question: str = "Who?") -> str:
            quoting = quoting_of(tokenizer, ids_of(question), ids_of(neutral))
            behind = with_quotes(prompt, find_quotes(lm, prompt, memory, quotes, quoting=quoting), newline)
            assert len(behind) == len(prompt) + 65 * quotes + (quotes > 0)
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
