"""Texts side by side: each against ``generate`` for it alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.memory.passages import AttentionTrace
from lightning_fot.model.reading.together import Together
from tests.support.decoder_types import tiny
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens

NEW = 24


def alone(lm, prompt, memory):
    """Tokens and logits of ``generate``, and where it attended."""
    with lm.record_attention() as trace:
        out = lm.generate(
            prompt[None], memory, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits), trace


def side_by_side(lm, prompts, memories, joins, traces=None):
    """The same, where text i joins after ``joins[i]`` steps and leaves after its last token."""
    together = Together(lm.attachment)
    texts, answers, logits, step = {}, [[] for _ in prompts], [[] for _ in prompts], 0
    waiting = dict(enumerate(joins))
    while waiting or texts:
        for number in [number for number, at in waiting.items() if at <= step]:
            trace = None if traces is None else traces[number]
            texts[number] = lm.continuation(prompts[number].tolist(), memories[number], trace)
            del waiting[number]
        for text in texts.values():
            text.read_part()
        ready = [number for number, text in texts.items() if text.ready]
        if ready:
            last = [answers[number][-1] if answers[number] else int(prompts[number][-1]) for number in ready]
            found = together.go_on([texts[number] for number in ready], last)
            for row, number in enumerate(ready):
                logits[number].append(found[row])
                answers[number].append(int(found[row].argmax()))
                if len(answers[number]) == NEW:
                    del texts[number]
        step += 1
    return answers, [torch.stack(rows) for rows in logits]


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (tiny_llama, {}),
        (tiny_qwen3, {"overlap": 4, "sink_tokens": 2}),
        (tiny_llama, {"last_context_length": 7, "memory_layers": [0, 2]}),
        (tiny_llama, {"top_k": 3, "retriever": {"name": "hnsw", "min_index_size": 1}}),
        (tiny_llama, {"top_k": 3, "overlap": 4, "positions": "constant"}),
        pytest.param(lambda: tiny("deepseek_v3"), {"overlap": 4, "sink_tokens": 1}, id="latents"),
        pytest.param(lambda: tiny("gemma2"), {"top_k": 3}, id="caps-and-sliding-windows"),
        pytest.param(lambda: tiny("gpt_oss"), {"top_k": 3, "overlap": 4}, id="sinks-and-sliding-windows"),
        pytest.param(lambda: tiny("smollm3"), {"top_k": 3}, id="layers-that-do-not-rotate"),
        pytest.param(lambda: tiny("lfm2"), {"top_k": 3}, id="layers-with-states"),
    ],
)
def test_each_text_gets_what_it_gets_alone(make, change):
    """Windows move at different tokens, prompts are shorter and longer than a window, memories differ."""
    with attach_memory(make(), settings(**change)) as lm:
        one, other = lm.new_memory(), lm.new_memory()
        lm.ingest(tokens(1, 50, seed=1), one, document="one")
        lm.ingest(tokens(1, 23, seed=2), other, document="other")
        # The first and the last share a memory, until a window moves; a memory of its own is empty.
        memories = [one, other, lm.new_memory(), one]
        prompts = [tokens(1, count, seed=count)[0] for count in (5, 2 * WINDOW + 2, 1, 9)]
        expected = [alone(lm, prompt, memory) for prompt, memory in zip(prompts, memories, strict=True)]
        traces = [AttentionTrace() for _ in prompts]
        answers, logits = side_by_side(lm, prompts, memories, (0, 2, 9, 4), traces)
        for number, (ids, row, trace) in enumerate(expected):
            assert answers[number] == ids
            torch.testing.assert_close(logits[number], row, atol=1e-4, rtol=1e-4)
            for queries in ("prompt", "answer"):
                for mine, theirs in zip(
                    traces[number].pair_mass(memories[number], queries=queries),
                    trace.pair_mass(memories[number], queries=queries),
                    strict=True,
                ):
                    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        assert (len(one), len(other)) == (50, 23)


@pytest.mark.slow
def test_a_text_whose_neighbour_fails_goes_on():
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.new_memory()
        lm.ingest(tokens(1, 50, seed=1), memory)
        prompts = [tokens(1, count, seed=count)[0] for count in (15, 16)]
        expected = [alone(lm, prompt, memory)[0] for prompt in prompts]
        texts = [lm.continuation(prompt.tolist(), memory) for prompt in prompts]
        for text in texts:
            text.read_part()
        last = [int(prompt[-1]) for prompt in prompts]
        together = Together(lm.attachment)
        with pytest.raises(IndexError):
            together.go_on(texts, [last[0], 10**6])
        answers = [[], []]
        for _ in range(NEW):
            last = together.go_on(texts, last).argmax(-1).tolist()
            for answer, token in zip(answers, last, strict=True):
                answer.append(token)
        assert answers == expected


def test_a_text_may_leave_and_come_back():
    """In between it goes on alone, or waits; its place in the batch is another's meanwhile."""
    with attach_memory(tiny_llama(), settings(top_k=3, overlap=4)) as lm:
        memory = lm.new_memory()
        lm.ingest(tokens(1, 50, seed=1), memory)
        prompts = [tokens(1, count, seed=count)[0] for count in (3, 12, 7, 15)]
        expected = [alone(lm, prompt, memory)[0] for prompt in prompts]
        texts = [lm.continuation(prompt.tolist(), memory) for prompt in prompts]
        for text in texts:
            text.read_part()
        together, answers = Together(lm.attachment), [[] for _ in texts]
        rounds = [(0, 1, 2), (2, 0), (0,), (3, 1), (1, 2, 3, 0), (3,), (2, 3), (1, 3)]
        for number in range(NEW):
            going = rounds[number % len(rounds)]
            last = [answers[text][-1] if answers[text] else int(prompts[text][-1]) for text in going]
            found = together.go_on([texts[text] for text in going], last).argmax(-1).tolist()
            for text, token in zip(going, found, strict=True):
                answers[text].append(token)
        for answer, wanted in zip(answers, expected, strict=True):
            assert len(answer) > 8
            assert answer == wanted[: len(answer)]


def test_what_is_not_finite_stays_in_its_own_row():
    """Where one text fails another takes its place: what it left would spoil sums, even under weights of 0."""
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.new_memory()
        prompts = [tokens(1, count, seed=count)[0] for count in (4, 12, 6, 3)]
        expected = [alone(lm, prompt, memory)[0] for prompt in prompts]
        texts = [lm.continuation(prompt.tolist(), memory) for prompt in prompts]
        for text in texts:
            text.read_part()
        together, answers = Together(lm.attachment), [[int(prompt[-1])] for prompt in prompts]
        for going in ((0, 1, 2), *[(0, 1, 3)] * (NEW - 1)):
            found = together.go_on([texts[text] for text in going], [answers[text][-1] for text in going])
            for text, token in zip(going, found.argmax(-1).tolist(), strict=True):
                answers[text].append(token)
            for layer in texts[2].cache.local_layers.values():
                for buffer in layer.buffers.values():
                    buffer.fill_(float("nan"))
        for number in (0, 1, 3):
            assert answers[number][1:] == expected[number][: len(answers[number]) - 1]
