"""Answers end at the stops of a tokenizer's chat template, and nothing of these is said."""

from __future__ import annotations

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.library.answering import Answerer, AnswerSettings
from lightning_fot.pretrained import load_backbone, load_tokenizer

CONFIG = MemoryConfig(memory_layers=[1], window=16, top_k=4, overlap=4, sink_tokens=1)


def answer(stops: tuple[str, ...], template: str | None, count: int = 24) -> tuple[str, list[str], bool, int]:
    """Text, its pieces, whether it is complete, and the tokens of the answer."""
    tokenizer = load_tokenizer("tiny-random-llama")
    tokenizer.chat_template = template
    tokenizer.answer_stops = stops
    with attach_memory(load_backbone("tiny-random-llama"), CONFIG) as lm:
        memory = lm.ingest(torch.arange(3, 103)[None], lm.new_memory())
        pieces: list[str] = []
        said = Answerer(lm, tokenizer, memory, AnswerSettings(max_new_tokens=count)).ask("Who is it?", pieces.append)
    return said.text, pieces, said.complete, said.answer_tokens


@pytest.mark.slow
@pytest.mark.parametrize("place", [1, 4, 9])
def test_an_answer_ends_before_a_stop_and_is_the_beginning_of_what_it_would_be(place: int) -> None:
    template = "Q: {{ messages[-1]['content'] }} A:"
    whole, pieces, complete, tokens = answer((), template)
    assert "".join(pieces) == whole
    assert not complete
    stop = whole[place : place + 2]
    cut, pieces, complete, fewer = answer(("never", stop), template)
    assert "".join(pieces) == cut == whole[: whole.index(stop)]
    assert complete
    assert fewer < tokens


def test_without_a_template_nothing_is_cut() -> None:
    whole, _, _, tokens = answer((), None)
    again = answer((whole[3:5],), None)
    assert (again[0], again[3]) == (whole, tokens)
