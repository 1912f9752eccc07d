"""Answers in the form of OpenAI's interface, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any

from lightning_fot.library.answering import quotes_of, stops_of
from lightning_fot.serving.engine import Engine, Event, Finished, Piece, Ticket
from lightning_fot.serving.requests import Asked
from lightning_fot.serving.shelf import Shelves

DONE = "data: [DONE]\n\n"


class Answers:
    """The answers to one request, ``n`` for each of its prompts.

    Args:
        asked: The request.
        shelves: What is asked.
        engine: What answers.
    """

    def __init__(self, asked: Asked, shelves: Shelves, engine: Engine) -> None:
        self._asked = asked
        self._shelves = shelves
        self._engine = engine
        self._shelf = shelves.find(asked.model)
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._tickets: list[Ticket] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._prompt_tokens = 0

    async def begin(self, longest: int) -> None:
        """Hands the request to the engine.

        Args:
            longest: Tokens of a prompt.

        Raises:
            ApiError: It cannot be answered.
        """
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._shelves.encoder, self._shelves.prompts, self._asked, longest)
        self._prompt_tokens = sum(map(len, prompts))
        memory, wanted = self._shelf.memory, self._asked.wanted
        quoting = None
        if self._asked.chat:
            wanted = replace(wanted, stop=(*wanted.stop, *stops_of(self._shelves.tokenizer)), trim=True)
            if wanted.quotes is None:
                wanted = replace(wanted, quotes=quotes_of(self._shelves.tokenizer))
            if wanted.quotes:
                quoting = await loop.run_in_executor(self._shelves.encoder, self._shelves.quoting, self._asked)
        for number in range(len(prompts) * self._asked.n):
            copy = number % self._asked.n
            own = wanted if wanted.seed is None else replace(wanted, seed=wanted.seed + copy)
            prompt, emit = prompts[number // self._asked.n], self._emitter(loop, number)
            self._tickets.append(Ticket(prompt, memory, own, emit, quoting=quoting))
        self._engine.submit(self._tickets)

    def _emitter(self, loop: asyncio.AbstractEventLoop, number: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            # The loop has ended where the server was stopped at once: nobody is there to be told.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return emit

    def cancel(self) -> None:
        """Nobody waits for them any more."""
        self._engine.cancel(self._tickets)

    async def whole(self) -> dict[str, Any]:
        """All of them, complete.

        Raises:
            ApiError: The model failed, or the server was stopped.
        """
        texts = [""] * len(self._tickets)
        ends: dict[int, Finished] = {}
        while len(ends) < len(self._tickets):
            number, event = await self._events.get()
            if isinstance(event, Piece):
                texts[number] += event.text
            elif isinstance(event, Finished):
                ends[number] = event
            else:
                raise event.error
        choices = [self._choice(number, text, ends[number].reason) for number, text in enumerate(texts)]
        passages = [one for number in sorted(ends) for one in _passages(number, ends[number])]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage(ends), "passages": passages}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; the one that ends an answer carries its passages."""
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        head, ends = self._head(kind), dict[int, Finished]()
        if self._asked.chat:
            for number in range(len(self._tickets)):
                yield _event({**head, "choices": [self._part(number, {"role": "assistant", "content": ""})]})
        while len(ends) < len(self._tickets):
            number, event = await self._events.get()
            if isinstance(event, Piece):
                yield _event({**head, "choices": [self._part(number, {"content": event.text})]})
            elif isinstance(event, Finished):
                ends[number] = event
                last = self._part(number, {}, event.reason)
                yield _event({**head, "choices": [last], "passages": _passages(number, event)})
            else:
                yield _event(event.error.body())
                return
        if self._asked.usage:
            yield _event({**head, "choices": [], "usage": self._usage(ends)})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._shelf.name}

    def _choice(self, number: int, text: str, reason: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
        return {"index": number, **said, "finish_reason": reason, "logprobs": None}

    def _part(self, number: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._asked.chat else {"text": delta.get("content", "")}
        return {"index": number, **said, "finish_reason": reason, "logprobs": None}

    def _usage(self, ends: dict[int, Finished]) -> dict[str, int]:
        answered = sum(end.tokens for end in ends.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self._prompt_tokens + answered,
        }


def _passages(number: int, end: Finished) -> list[dict[str, Any]]:
    return [{"choice": number, **asdict(passage)} for passage in end.passages]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
