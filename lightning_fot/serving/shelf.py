"""The memories that a server has, by name, and the one model that reads them all."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.library.answering import encoded, framed, quoting_of
from lightning_fot.library.inbox import Handed
from lightning_fot.library.library import Library
from lightning_fot.library.quotes import NEUTRAL, Quoting
from lightning_fot.serving.requests import ApiError, Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.library.library import Entry
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM


@dataclass(frozen=True)
class Shown:
    """A document that can be asked about.

    Args:
        name: Its name.
        tokens: How many have been read.
        stored: How many of them the memory still holds.
        done: Whether it was read to its end.
    """

    name: str
    tokens: int
    stored: int
    done: bool


@dataclass(eq=False)
class Job:
    """A text on its way into a memory.

    Args:
        handed: The text.
        state: ``waiting``, ``reading``, ``failed``, ``ready``, or ``known``: it is that of a document of another name.
        read: Tokens of it read so far.
        detail: Why it failed, what it waits for, or the name of the document that it is.
        cancelled: Whether nobody wants it any more.
    """

    handed: Handed
    state: str = "waiting"
    read: int = 0
    detail: str | None = None
    cancelled: bool = False


class Shelf:
    """A memory that is asked by many.

    Args:
        name: What clients call it.
        memory: What it holds: nothing, of the bare model.
        library: Its folder; None of the bare model.
        stamp: State of the folder that the memory was loaded from.
    """

    def __init__(self, name: str, memory: Memory, library: Library | None, stamp: object = None) -> None:
        self.name = name
        self.library = library
        self.stamp = stamp
        self._lock = threading.Lock()
        self._memory = memory
        self._entries: dict[str, tuple[int | None, bool]] = {}
        if library is not None:
            self.show(memory, library.documents)

    @property
    def memory(self) -> Memory:
        """What an answer that begins now attends to: a snapshot that later changes leave alone."""
        with self._lock:
            return self._memory.snapshot()

    @property
    def documents(self) -> list[Shown]:
        """What answers that begin now can attend to, in the order of reading."""
        with self._lock:
            memory, entries = self._memory, self._entries
        read = {one.name: one for one in memory.snapshot().documents}
        found = []
        for name, (tokens, done) in entries.items():
            known = read.get(name)
            if known is not None or done:
                # A full memory drops the oldest pairs, and its log what has none left.
                count = tokens if tokens is not None else known.tokens if known is not None else 0
                found.append(Shown(name, count, 0 if known is None else known.stored, done))
        return found

    def show(self, memory: Memory, entries: Sequence[Entry]) -> None:
        """Puts another state in its place, for answers that begin from now on.

        Args:
            memory: It is copied, and goes on as it is.
            entries: Documents of the library; those that are being forgotten are not shown.
        """
        shown = memory.snapshot()
        leaving = [entry.name for entry in entries if entry.leaving and shown.log.find(entry.name)]
        for name in leaving:
            shown.forget(name)
        if leaving:
            shown.flush()
        listed = {entry.name: (entry.tokens, entry.done) for entry in entries if not entry.leaving}
        with self._lock:
            self._memory, self._entries = shown, listed


class Shelves:
    """All of them.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        libraries: By the name that clients use.
    """

    def __init__(self, lm: MemoryLM, tokenizer: PreTrainedTokenizerBase, libraries: Mapping[str, Library]) -> None:
        self.lm = lm
        self.tokenizer: Any = tokenizer
        self.shelves: dict[str, Shelf] = {}
        for name, library in libraries.items():
            # Another process may have written since the library was opened.
            stamp = library.stamp()
            library.refresh()
            memory = library.load(lm)
            # Whoever waits should wait here, not after the first question.
            memory.flush()
            self.shelves[name] = Shelf(name, memory, library, stamp)
        backbone = Path(next(iter(libraries.values())).model.backbone).name
        self.bare = f"{backbone}:bare" if backbone in self.shelves else backbone
        """Name of the model without a memory."""
        self.shelves[self.bare] = Shelf(self.bare, lm.new_memory(1), None)
        # Tokenizers are not made for threads, and a megabyte of text takes a while.
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def find(self, name: str) -> Shelf:
        """The memory of that name.

        Raises:
            ApiError: There is none.
        """
        if name not in self.shelves:
            known = ", ".join(self.shelves)
            raise ApiError(404, f"There is no model '{name[:100]}'. There are: {known}.", "model", "model_not_found")
        return self.shelves[name]

    def prompts(self, asked: Asked, longest: int) -> list[list[int]]:
        """Token ids of a request's prompts; called in the thread of :attr:`encoder`.

        Args:
            asked: The request.
            longest: Tokens that one may have.

        Raises:
            ApiError: One cannot be used.
        """
        if asked.chat:
            field, prompts = "messages", [self._conversation(asked.messages)]
        else:
            field = "prompt"
            prompts = [self._encoded(one, True, field) if isinstance(one, str) else one for one in asked.prompts]
        for ids in prompts:
            if len(ids) > longest:
                raise ApiError(
                    400, f"The prompt has {len(ids):,} tokens; this server reads {longest:,} at most. Upload long "
                    "texts as documents.", field, "context_length_exceeded",
                )  # fmt: skip
            if not 0 <= min(ids) <= max(ids) < self.lm.vocabulary:
                raise ApiError(400, f"Token ids must be from 0 to {self.lm.vocabulary - 1}.", field, "invalid_value")
        return prompts

    def quoting(self, asked: Asked) -> Quoting:
        """What quotes of a conversation are found by: the words of its last message; called as :meth:`prompts`.

        Args:
            asked: A request for a chat, whose prompts were found good.
        """
        last = asked.messages[-1]
        neutral = self._conversation([*asked.messages[:-1], {**last, "content": NEUTRAL}])
        return quoting_of(self.tokenizer, self._encoded(last["content"], False, "messages"), neutral)

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            try:
                text = framed(self.tokenizer, list(messages), "messages", "Use /v1/completions.")
            except SettingError as error:
                raise ApiError(400, f"The last message {error.problem}. {error.fix}", "messages") from error
            return self._encoded(text, False, "messages")
        # As `lightning ask` goes on without a template: a line for each question, answers as they are.
        text = ""
        for message in messages:
            content = message["content"]
            if message["role"] == "user" and text:
                content = f"\n{content}\n"
            elif message["role"] == "system":
                content = f"{content}\n"
            text += content
        return self._encoded(text, True, "messages")

    def _encoded(self, text: str, first: bool, field: str) -> list[int]:
        try:
            return encoded(self.tokenizer, text, first, field)
        except SettingError as error:
            raise ApiError(400, f"'{field}' {error.problem}. {error.fix}", field, "invalid_value") from error
