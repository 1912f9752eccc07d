"""Answers over HTTP, asked by OpenAI's own client, against direct calls of the model."""

from __future__ import annotations

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.support.markdown_blocks import ROOT, blocks
from tests.support.patience import PATIENCE_S
from tests.support.serving import EOS, Room, Running, running, until

QUESTION = "What is word5?"
FRAMED = f"[user] {QUESTION}\n[assistant]"
CHAT: Any = [{"role": "user", "content": QUESTION}]


def expected(room: Room, name: str, prompt: str, count: int, **options: Any) -> tuple[str, int, str]:
    """Text, tokens, and why it ended."""
    ids, _ = room.alone(name, prompt, count, **options)
    return room.text(ids), len(ids), "stop" if ids[-1] == EOS else "length"


def test_models_are_the_memories_and_the_bare_model(room: Room, server: Running) -> None:
    models = server.client().models.list().data
    assert [model.id for model in models] == ["mine", "other", "model"]
    held: Any = [model.memory for model in models]  # type: ignore[attr-defined]
    assert held[:2] == [{"documents": count, "tokens": len(room.memory(name))} for name, count in
                        (("mine", 3), ("other", 1))]  # fmt: skip
    assert server.client().models.retrieve("other").id == "other"


@pytest.mark.parametrize("name", ["mine", "other", "model"])
def test_the_greedy_answer_is_that_of_a_direct_call(room: Room, server: Running, name: str) -> None:
    text, tokens, reason = expected(room, name, FRAMED, 12)
    done = server.client().chat.completions.create(model=name, messages=CHAT, max_tokens=12)
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (text, reason, "assistant")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(FRAMED), tokens)
    assert done.usage.total_tokens == len(FRAMED) + tokens


def test_passages_are_those_of_a_direct_call(room: Room, server: Running) -> None:
    _, trace = room.alone("mine", FRAMED, 12)
    found = trace.passages(room.memory("mine"), 64, 2, queries="answer")
    client = server.client()
    done: Any = client.chat.completions.create(model="mine", messages=CHAT, max_tokens=12, extra_body={"passages": 2})
    assert len(found) == len(done.passages) == 2
    for passage, given in zip(found, done.passages, strict=True):
        assert given["document"] == passage.document.name
        assert (given["start"], given["stop"], given["choice"]) == (passage.start, passage.stop, 0)
        assert given["text"] == room.text(passage.token_ids.tolist())
        assert given["share"] == pytest.approx(passage.mass, abs=1e-4)
    none: Any = client.chat.completions.create(model="mine", messages=CHAT, max_tokens=3, extra_body={"passages": 0})
    assert none.passages == []


def test_a_stream_says_the_same_and_ends_with_passages(server: Running) -> None:
    client = server.client()
    whole: Any = client.chat.completions.create(model="mine", messages=CHAT, max_tokens=30)
    events: Any = list(
        client.chat.completions.create(
            model="mine", messages=CHAT, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == whole.choices[0].message.content
    *_, last, usage = events
    assert (last.choices[0].finish_reason, last.passages) == (whole.choices[0].finish_reason, whole.passages)
    assert (usage.choices, usage.usage) == ([], whole.usage)
    # Whoever takes the first choice of each event finds one.
    plain = client.chat.completions.create(model="mine", messages=CHAT, max_tokens=5, stream=True)
    assert all(len(event.choices) == 1 for event in plain)


def test_events_are_lines_that_end_with_done(server: Running) -> None:
    body = json.dumps({"model": "mine", "prompt": "word5", "max_tokens": 3, "stream": True}).encode()
    with urllib.request.urlopen(f"{server.address}/v1/completions", body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_a_plain_completion_takes_texts_and_ids(room: Room, server: Running) -> None:
    client = server.client()
    texts = [expected(room, "mine", prompt, 6)[0] for prompt in ("word5 word7", "b")]
    done = client.completions.create(model="mine", prompt=["word5 word7", "b"], max_tokens=6)
    assert [choice.text for choice in done.choices] == texts
    assert done.usage is not None
    assert done.usage.prompt_tokens == len("word5 word7b")
    ids = [byte + 3 for byte in b"word5 word7"]
    assert client.completions.create(model="mine", prompt=ids, max_tokens=6).choices[0].text == texts[0]


def test_an_answer_ends_before_a_stop(room: Room, server: Running) -> None:
    text, _, _ = expected(room, "mine", "word5 word7", 40)
    stop = text[5:8]
    client = server.client()
    done = client.completions.create(model="mine", prompt="word5 word7", max_tokens=40, stop=["no such text", stop])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    events = client.completions.create(model="mine", prompt="word5 word7", max_tokens=40, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in events) == text[: text.index(stop)]


def test_a_seed_gives_what_transformers_draws(room: Room, server: Running) -> None:
    texts = []
    for seed in (7, 8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            texts.append(expected(room, "mine", FRAMED, 12, do_sample=True, temperature=1.3, top_p=0.9, top_k=0)[0])
    done = server.client().chat.completions.create(
        model="mine", messages=CHAT, max_tokens=12, temperature=1.3, top_p=0.9, seed=7, n=2
    )
    assert [choice.message.content for choice in done.choices] == texts
    assert len(set(texts)) == 2
    cold = server.client().chat.completions.create(model="mine", messages=CHAT, max_tokens=12, temperature=0, top_p=0.9)
    assert cold.choices[0].message.content == expected(room, "mine", FRAMED, 12)[0]


@pytest.mark.slow
def test_under_load_each_answer_is_that_given_alone(room: Room, server: Running) -> None:
    """More clients than places in the batch, several memories, prompts of one token and of several windows."""
    asked = [
        (name, " ".join(f"word{(number * place) % 97}" for place in range(1, 2 + 4 * number)), 5 + 3 * number)
        for number in range(5)
        for name in ("mine", "other", "model")
    ]
    answers = {one: expected(room, *one) for one in asked}
    begin = threading.Barrier(len(asked))

    def ask(one: tuple[str, str, int]) -> Any:
        begin.wait(PATIENCE_S)
        name, prompt, count = one
        return server.client().completions.create(model=name, prompt=prompt, max_tokens=count)

    with ThreadPoolExecutor(len(asked)) as pool:
        for one, done in zip(asked, pool.map(ask, asked), strict=True):
            choice = done.choices[0]
            assert done.usage is not None
            assert (choice.text, done.usage.completion_tokens, choice.finish_reason) == answers[one]


def endless(running: Running) -> Any:
    """A stream that nobody will see the end of; its first words have come."""
    # An answer of this model has no end of its own: the tests of answers above would show one.
    stream = running.client().completions.create(model="mine", prompt="word5", max_tokens=10**6, stream=True)
    return stream


def test_a_client_that_goes_away_ends_its_answer(server: Running) -> None:
    stream = endless(server)
    next(iter(stream))
    assert server.number("fot_requests_running") == 1
    stream.close()
    until(lambda: server.number("fot_requests_running") == 0)
    # The same for one that waits for the whole.
    client = server.client().with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="mine", prompt="word5", max_tokens=10**6)
    until(lambda: server.number("fot_requests_running") == 0)


def test_those_that_there_is_no_room_for_are_told_so(room: Room) -> None:
    with running(room, max_batch=1, max_queue=1, max_tokens=10**6) as small:
        first = endless(small)
        next(iter(first))
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(lambda: small.client().completions.create(model="mine", prompt="b", max_tokens=2))
            until(lambda: small.number("fot_requests_waiting") == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                small.client().completions.create(model="mine", prompt="b", max_tokens=2)
            assert refused.value.code == "queue_full"
            first.close()
            assert second.result(PATIENCE_S).choices[0].finish_reason == "length"


def test_metrics_count_what_was_answered(room: Room) -> None:
    with running(room) as fresh:
        done = fresh.client().completions.create(model="mine", prompt="word5", max_tokens=4)
        assert done.usage is not None
        with urllib.request.urlopen(f"{fresh.address}/metrics") as response:
            lines = response.read().decode().splitlines()
        assert "fot_completion_tokens_total 4" in lines
        assert f"fot_prompt_tokens_total {done.usage.prompt_tokens}" in lines
        assert 'fot_http_responses_total{route="/v1/completions",status="200"} 1' in lines
        assert f'fot_memory_tokens{{memory="mine"}} {len(room.memory("mine"))}' in lines
        with urllib.request.urlopen(f"{fresh.address}/health") as response:
            assert json.load(response) == {"status": "ok"}


@pytest.mark.slow
def test_a_server_that_stops_finishes_what_it_has_begun(room: Room) -> None:
    text, _, _ = expected(room, "mine", "word5", 200)
    with running(room) as stopping:
        stream = iter(stopping.client().completions.create(model="mine", prompt="word5", max_tokens=200, stream=True))
        said = [next(stream)]
        stopping.server.stop()
        said += list(stream)
    assert "".join(event.choices[0].text for event in said) == text


def test_what_is_not_finished_in_time_is_told(room: Room) -> None:
    with running(room, grace=0.05, max_tokens=10**6) as stopping:
        stream = iter(endless(stopping))
        next(stream)
        stopping.server.stop()
        with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
            list(stream)


def test_the_python_of_the_page_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), "python")
    block = block.replace("http://127.0.0.1:8000", server.address).replace('"shelf"', '"mine"')
    exec(compile(block, "docs/serving.md", "exec"), {"__name__": "page"})
    assert "book" in capsys.readouterr().out
