"""Answers beside a memory, streamed, with the passages that were attended to."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lightning_fot.data.text.spelling import spelling
from lightning_fot.errors import SettingError
from lightning_fot.library.answer import Answer, AttendedPassage
from lightning_fot.library.quotes import NEUTRAL, Quoting, find_quotes, with_quotes
from lightning_fot.library.words import Words
from lightning_fot.memory.token_log import UNKNOWN_TOKEN
from lightning_fot.memory.windows import AskedWords

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.memory.memory import Memory
    from lightning_fot.memory.passages import AttentionTrace
    from lightning_fot.model.lm import MemoryLM


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are answered: greedily, unless one of the settings of sampling is given.

    Args:
        max_new_tokens: Longest answer.
        temperature: Of sampling; None means 1.
        top_p: Sample among the likeliest tokens of this joint probability; None means all.
        top_k_tokens: Sample among this many likeliest tokens; None means all.
        seed: Of sampling; None draws one for each answer.
        passages: Passages wanted; with 0 attention is not recorded.
        passage_tokens: Tokens of a passage.
        raw: Continue the question as it is, even where the tokenizer has a chat template.
        quotes: Passages that the question attends to, read once more right before it; None takes as many as the model
            is asked with (:func:`quotes_of`).
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_p: float | None = None
    top_k_tokens: int | None = None
    seed: int | None = None
    passages: int = 5
    passage_tokens: int = 64
    raw: bool = False
    quotes: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn."""
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k_tokens))


class Answerer:
    """Answers questions beside a memory, each with the conversation before it. The memory stays as it is.

    Args:
        lm: The attached model.
        tokenizer: Its tokenizer.
        memory: One row, what was read.
        settings: How to answer.
    """

    def __init__(
        self, lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, memory: Memory, settings: AnswerSettings
    ) -> None:
        self.lm = lm
        self.tokenizer: Any = tokenizer
        self.memory = memory
        self.settings = settings
        self.chat = bool(getattr(tokenizer, "chat_template", None)) and not settings.raw
        """Whether the tokenizer's chat template frames questions and answers."""
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._ends = ends_of(lm, tokenizer)
        self._stops = stops_of(tokenizer) if self.chat else ()
        wanted = settings.quotes
        self._quotes = (quotes_of(tokenizer) if self.chat else 0) if wanted is None else wanted

    def ask(self, question: str, write: Callable[[str], None] = lambda text: None) -> Answer:
        """Answers a question.

        Args:
            question: Not empty.
            write: Gets the text of the answer in pieces, as it is generated.

        Raises:
            SettingError: The question has no tokens, or the chat template cannot be used.
        """
        began = time.monotonic()
        prompt = self._prompt(question)
        quoting = None
        if self._quotes and self.chat:
            quoting = quoting_of(self.tokenizer, encoded(self.tokenizer, question, False), self._prompt(NEUTRAL))
        behind = quoted(self.lm, self.tokenizer, self.memory, prompt, self._quotes, quoting)
        quotes, prompt = len(behind) - len(prompt), behind
        streamer = _Streamer(self.tokenizer, write, self._stops, self.chat)
        seed = self._seed()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with self.lm.record_attention() if self.settings.passages else nullcontext() as trace:
                try:
                    sequence = self._generate(prompt, streamer)[0].tolist()
                except BaseException:
                    # Words that are held back until they are complete: what was answered so far is kept on screen.
                    streamer.end()
                    raise
        answer = sequence[len(prompt) :]
        ended = bool(answer) and answer[-1] in self._ends
        complete = ended or streamer.words.stopped
        # The next question has quotes of its own.
        self._ids = sequence[quotes:-1] if ended else sequence[quotes:]
        text = streamer.text
        self._messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        passages = None if trace is None else self._passages(trace)
        seconds = time.monotonic() - began
        return Answer(question, text, complete, len(prompt) - quotes, len(answer), seconds, seed, passages)

    def _prompt(self, question: str) -> list[int]:
        """Ids of the conversation and the question."""
        if self.chat:
            messages = [*self._messages, {"role": "user", "content": question}]
            return encoded(self.tokenizer, framed(self.tokenizer, messages, "question", "Add --raw."), first=False)
        if self._ids:
            return [*self._ids, *encoded(self.tokenizer, f"\n{question}\n", first=False)]
        return encoded(self.tokenizer, question, first=True)

    def _seed(self) -> int | None:
        if not self.settings.sampled:
            return None
        return random.SystemRandom().randrange(2**32) if self.settings.seed is None else self.settings.seed

    def _generate(self, prompt: list[int], streamer: _Streamer) -> Tensor:
        settings = self.settings
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.sampled:
            # Said in full: what is left out would come from the model's own generation_config.
            sampling = {
                "do_sample": True,
                "temperature": 1.0 if settings.temperature is None else settings.temperature,
                "top_p": 1.0 if settings.top_p is None else settings.top_p,
                "top_k": settings.top_k_tokens or 0,
            }
        if self._ends:
            sampling |= {"eos_token_id": self._ends, "pad_token_id": self._ends[0]}
        if self._stops:
            sampling["stopping_criteria"] = StoppingCriteriaList([_Stopped(streamer)])
        generated: Tensor = self.lm.generate(
            torch.tensor([prompt]),
            self.memory,
            max_new_tokens=settings.max_new_tokens,
            streamer=streamer,
            **sampling,
        )
        return generated

    def _passages(self, trace: AttentionTrace) -> list[AttendedPassage]:
        settings = self.settings
        return attended_passages(trace, self.memory, self.tokenizer, settings.passage_tokens, settings.passages)


def framed(tokenizer: Any, messages: Sequence[Mapping[str, str]], setting: str, fix: str) -> str:
    """A conversation as the chat template writes it, up to where the answer begins.

    Args:
        tokenizer: Has a chat template.
        messages: Role and content of each; the last one is the question.
        setting: What errors name.
        fix: What errors advise.

    Raises:
        SettingError: The template cannot be used, or leaves the question out.
    """
    question = messages[-1]["content"]
    # Some templates want a list of parts, and write nothing of a text.
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    for given in (messages, parts):
        try:
            text = str(tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates are programs of others
            # A template that only knows text fails with parts, and has been heard already.
            if given is messages:
                said = " ".join(str(error).split())[:300] or type(error).__name__
                raise SettingError(setting, question, f"the chat template says: {said}", fix) from error
            continue
        if "".join(question.split()) in "".join(text.split()):
            return text
    raise SettingError(setting, question, "is left out by the model's chat template", fix)


def encoded(tokenizer: Any, text: str, first: bool, setting: str = "question") -> list[int]:
    """Ids of a text that is to be continued.

    Args:
        tokenizer: Encodes it.
        text: What.
        first: Whether it gets the start token that the tokenizer puts before texts.
        setting: What errors name.

    Raises:
        SettingError: It has no tokens.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=first)["input_ids"]
    # Some tokenizers end each text; an answer goes on where the question stops.
    while first and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise SettingError(setting, text, "has no tokens", "Ask something else.")
    return ids


def quoted(
    lm: MemoryLM,
    tokenizer: Any,
    memory: Memory,
    prompt: list[int],
    quotes: int,
    quoting: Quoting | None = None,
) -> list[int]:
    """Ids of a prompt behind the passages that it is about.

    Args:
        lm: The attached model.
        tokenizer: Its tokenizer.
        memory: One row, what was read.
        prompt: Ids of the question, framed as it will be asked.
        quotes: Passages wanted.
        quoting: What they are found by; None takes the prompt for the question, framed by nothing.
    """
    if not quotes:
        return prompt
    between = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if quoting is None:
        quoting = quoting_of(tokenizer, prompt, tokenizer(NEUTRAL, add_special_tokens=False)["input_ids"])
    found = find_quotes(lm, prompt, memory, quotes, quoting=quoting, between=len(between))
    return with_quotes(prompt, found, between)


def quoting_of(tokenizer: Any, question: Sequence[int], neutral: Sequence[int]) -> Quoting:
    """What quotes are found by, beside the prompt.

    Args:
        tokenizer: Of the model.
        question: Ids of the question alone.
        neutral: Ids of :data:`~lightning_fot.library.quotes.NEUTRAL`, framed as the prompt is.
    """
    return Quoting(neutral, AskedWords(spelling(tokenizer), torch.tensor(question, dtype=torch.int64)))


def attended_passages(
    trace: AttentionTrace, memory: Memory, tokenizer: Any, length: int, top: int
) -> list[AttendedPassage]:
    """The passages that an answer attended to, best first.

    Args:
        trace: What was noted while it was generated.
        memory: One row, what was attended to.
        tokenizer: Decodes them.
        length: Tokens of a passage.
        top: Passages wanted.
    """
    return [
        AttendedPassage(
            passage.document.name or f"document {passage.document.number + 1}",
            passage.start,
            passage.stop,
            passage.document.tokens,
            passage.mass,
            passage.lift,
            tokenizer.decode(_known(passage.token_ids), skip_special_tokens=True),
        )
        for passage in trace.passages(memory, length, top, queries="answer")
    ]


def _known(ids: Tensor) -> list[int]:
    """Ids without those of pairs that were stored without their tokens."""
    return [token for token in ids.tolist() if token != UNKNOWN_TOKEN]


class _Streamer(BaseStreamer):
    """Hands on the words of an answer, up to what ends it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stops: Sequence[str], trim: bool) -> None:
        self.words = Words(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stops, trim)
        self.text = ""
        self._write = write
        self._asked = False

    def put(self, value: Tensor) -> None:
        if not self._asked:  # the prompt comes first
            self._asked = True
            return
        for token in value.flatten().tolist():
            self._say(self.words.add(token))

    def end(self) -> None:
        self._say(self.words.end())

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)


class _Stopped(StoppingCriteria):
    """Ends an answer at one of its stops; the streamer gets each token before this is asked."""

    def __init__(self, streamer: _Streamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._streamer.words.stopped, device=input_ids.device)


def stops_of(tokenizer: Any) -> tuple[str, ...]:
    """Texts that end an answer in the chat template of a tokenizer, where it has no token for that."""
    return tuple(getattr(tokenizer, "answer_stops", ()))


def quotes_of(tokenizer: Any) -> int:
    """Passages that a question is asked behind in the chat template of a tokenizer."""
    return int(getattr(tokenizer, "answer_quotes", 0))


def ends_of(lm: MemoryLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model, and the tokenizer's, which chat templates put behind a turn."""
    own = getattr(lm.model.generation_config, "eos_token_id", None)
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    last = tokenizer.eos_token_id
    return [*ends, last] if isinstance(last, int) and last not in ends else ends
