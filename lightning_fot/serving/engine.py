"""Answers side by side in one batch: each joins when there is room, and leaves when it is complete.

One thread runs the model. In each round it reads one part of one prompt, about a window, so that a long prompt does not
hold up the others, and then one token of every answer. Texts have their own local windows and memories
(:mod:`lightning_fot.model.reading.together`), so what an answer says does not depend on its neighbours.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lightning_fot.errors import SettingError
from lightning_fot.library.answer import AttendedPassage
from lightning_fot.library.answering import attended_passages, ends_of, quoted
from lightning_fot.library.quotes import Quoting
from lightning_fot.library.words import Words
from lightning_fot.memory.passages import AttentionTrace
from lightning_fot.model.reading.together import Together
from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.requests import ApiError, Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

PASSAGE_TOKENS = 64


@dataclass(frozen=True)
class Piece:
    """Text of an answer, in its order.

    Args:
        text: Not empty.
    """

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Args:
        reason: ``stop`` or ``length``.
        tokens: Tokens generated.
        passages: What it attended to, best first.
    """

    reason: str
    tokens: int
    passages: list[AttendedPassage]


@dataclass(frozen=True)
class Failed:
    """An answer that will not come.

    Args:
        error: Why.
    """

    error: ApiError


Event = Piece | Finished | Failed


@dataclass
class Ticket:
    """An answer that is wanted.

    Args:
        prompt: Token ids.
        memory: What to attend to, one row; it stays as it is.
        wanted: How to generate it.
        emit: Gets what comes, in the engine's threads.
        cancelled: Set by whoever does not want it any more.
        quoting: What the prompt's quotes are found by; None takes all of the prompt for the question.
    """

    prompt: list[int]
    memory: Memory
    wanted: Wanted
    emit: Callable[[Event], None]
    cancelled: bool = False
    quoting: Quoting | None = None
    asked_at: float = field(default_factory=time.monotonic)


class Engine:
    """Generates answers, many at once.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        max_batch: Answers generated side by side.
        max_queue: Answers that may wait.
        metrics: Counts.
    """

    def __init__(
        self, lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, max_batch: int, max_queue: int, metrics: Metrics
    ) -> None:
        self.lm = lm
        # Tokenizers are not made for threads: this one is used by the engine's alone.
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.max_batch = max_batch
        self.max_queue = max_queue
        self._metrics = metrics
        self._ends = frozenset(ends_of(lm, tokenizer))
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._rows: list[_Row] = []
        self._joining: list[Ticket] = []
        self._together = Together(lm.attachment)
        self._closing = False
        self._deadline = float("inf")
        # Looking for passages goes through all of a memory: it must not hold up the others.
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="passages")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Takes answers to be generated: all of them or none.

        Raises:
            ApiError: There is no room, or the server is stopping.
        """
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ApiError(503, "The server is stopping.", code="stopping")
            # Those that there is a place for do not wait.
            room = self.max_batch - self._taken + self.max_queue - len(self._waiting)
            if len(tickets) > room:
                raise ApiError(
                    429, f"{len(self._waiting)} answers are waiting already. Try again later.", code="queue_full"
                )
            self._waiting.extend(tickets)
            self._count()
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these any more: they give their places back."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            self._count()

    def stop(self, grace: float) -> None:
        """Takes no more; finishes what is there, for so many seconds at most. Returns at once."""
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + grace)
            self._changed.notify()

    def join(self) -> None:
        """Waits for the end that :meth:`stop` asked for."""
        if self._thread.is_alive():
            self._thread.join()
        self._finisher.shutdown()

    @property
    def _taken(self) -> int:
        """Places that answers have, or are about to have."""
        return len(self._rows) + len(self._joining)

    def _count(self) -> None:
        self._metrics.set("fot_requests_running", self._taken)
        self._metrics.set("fot_requests_waiting", len(self._waiting))

    def _run(self) -> None:
        while self._admit():
            try:
                self._round()
            except Exception as error:
                # Of all that this round was about: nobody knows what state they are in.
                self._fail(ApiError(500, f"The model failed ({type(error).__name__}: {error}).", code="model_failed"))

    def _admit(self) -> bool:
        """Waits for work and lets those in that there is a place for; False when there will be none any more."""
        with self._changed:
            while not self._waiting and not self._rows and not self._closing:
                self._count()
                self._changed.wait()
            late = time.monotonic() > self._deadline
            if not late:
                while self._waiting and self._taken < self.max_batch:
                    self._joining.append(self._waiting.popleft())
            self._count()
        # Without the lock: quotes are a pass of the model, for which nobody who submits or cancels should wait.
        while self._joining:
            row = self._row(self._joining[0])
            with self._changed:
                del self._joining[0]
                if row is not None:
                    self._rows.append(row)
                self._count()
        if late:
            self._fail(ApiError(503, "The server has stopped before the answer was complete.", code="stopping"))
        return bool(self._rows or self._waiting or not self._closing)

    def _row(self, ticket: Ticket) -> _Row | None:
        """An answer that begins; None where it does not, which its client has been told."""
        if ticket.cancelled:
            return None
        try:
            return _Row(ticket, self.lm, self.tokenizer)
        except SettingError as error:
            ticket.emit(Failed(ApiError(400, f"The prompt {error.problem}. {error.fix}", code="invalid_value")))
        except Exception as error:
            ticket.emit(Failed(ApiError(500, f"{type(error).__name__}: {error}", code="model_failed")))
        return None

    def _fail(self, error: ApiError) -> None:
        with self._changed:
            failed = [row.ticket for row in self._rows]
            self._rows = []
            if self._closing:
                failed += self._waiting
                self._waiting.clear()
            self._count()
        for ticket in failed:
            ticket.emit(Failed(error))

    def _round(self) -> None:
        """A part of a prompt, and a token of each answer."""
        self._rows = [row for row in self._rows if not row.ticket.cancelled]
        began = time.monotonic()
        reading = next((row for row in self._rows if not row.text.ready), None)
        if reading is not None:
            reading.text.read_part()
            if reading.text.ready:
                self._metrics.add("fot_prompt_tokens_total", len(reading.ticket.prompt))
        ready = [row for row in self._rows if row.text.ready]
        if ready:
            logits = self._together.go_on([row.text for row in ready], [row.last for row in ready])
            for row, token in zip(ready, _choose(ready, logits), strict=True):
                self._take(row, token)
        self._metrics.add("fot_model_seconds_total", time.monotonic() - began)

    def _take(self, row: _Row, token: int) -> None:
        """Hands on a token of an answer."""
        if not row.count:
            self._metrics.add("fot_first_token_seconds_total", time.monotonic() - row.ticket.asked_at)
            self._metrics.add("fot_first_tokens_total", 1)
        row.count, row.last = row.count + 1, token
        self._metrics.add("fot_completion_tokens_total", 1)
        reason = "stop" if token in self._ends else "length" if row.count >= row.ticket.wanted.max_tokens else None
        text = row.words.add(token)
        if reason is not None:
            text += row.words.end()
        if row.words.stopped:
            reason = "stop"
        if text:
            row.ticket.emit(Piece(text))
        if reason is not None:
            self._rows.remove(row)
            self._finisher.submit(self._finish, row, reason)

    def _finish(self, row: _Row, reason: str) -> None:
        try:
            began = time.monotonic()
            passages = row.passages(self.tokenizer)
            self._metrics.add("fot_passages_seconds_total", time.monotonic() - began)
            row.ticket.emit(Finished(reason, row.count, passages))
        except Exception as error:
            row.ticket.emit(Failed(ApiError(500, f"Passages could not be found ({error}).", code="passages_failed")))


class _Row:
    """An answer that is being generated."""

    def __init__(self, ticket: Ticket, lm: MemoryLM, tokenizer: Any) -> None:
        self.ticket = ticket
        self.last = ticket.prompt[-1]
        self.count = 0
        prompt = quoted(lm, tokenizer, ticket.memory, ticket.prompt, ticket.wanted.quotes or 0, ticket.quoting)
        self.trace = AttentionTrace() if ticket.wanted.passages and len(ticket.memory) else None
        self.text = lm.continuation(prompt, ticket.memory, self.trace)
        wanted = ticket.wanted
        self.words = Words(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), wanted.stop, wanted.trim)
        self.generator: torch.Generator | None = None
        self.warpers: list[Any] = []
        if wanted.temperature is not None:
            seed = random.SystemRandom().randrange(2**32) if wanted.seed is None else wanted.seed
            self.generator = torch.Generator(lm.device).manual_seed(seed)
            # In the order of transformers' `generate`.
            if wanted.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(wanted.temperature))
            if wanted.top_p < 1:
                self.warpers.append(TopPLogitsWarper(wanted.top_p))

    def passages(self, tokenizer: Any) -> list[AttendedPassage]:
        """What the answer attended to, best first."""
        if self.trace is None:
            return []
        wanted = self.ticket.wanted.passages
        return attended_passages(self.trace, self.ticket.memory, tokenizer, PASSAGE_TOKENS, wanted)


def _choose(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """The next token of each row, from (B, V) logits."""
    # As `generate` does: scores are compared and drawn from in float32.
    scores = logits.float()
    chosen: list[int] = scores.argmax(-1).tolist()
    for number, row in enumerate(rows):
        if row.generator is not None:
            own = scores[number : number + 1]
            for warper in row.warpers:
                own = warper(None, own)
            chosen[number] = int(torch.multinomial(own.softmax(-1), 1, generator=row.generator))
    return chosen
