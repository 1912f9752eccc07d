"""The memories that a server has, by name, and the one model that reads them all."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.library.answering import encoded, framed
from lightning_fot.library.library import Library
from lightning_fot.serving.requests import ApiError, Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM


class Shelf:
    """A memory that is asked by many.

    Args:
        name: What clients call it.
        memory: What it holds; None of the bare model, which has an empty one.
        library: Its folder.
    """

    def __init__(self, name: str, memory: Memory, library: Library | None) -> None:
        self.name = name
        self.library = library
        self._lock = threading.Lock()
        self._memory = memory

    @property
    def memory(self) -> Memory:
        """What an answer that begins now attends to: a snapshot that later changes leave alone."""
        with self._lock:
            return self._memory.snapshot()

    def show(self, memory: Memory) -> None:
        """Puts another state in its place, for answers that begin from now on."""
        with self._lock:
            self._memory = memory


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
            memory = library.load(lm)
            # Whoever waits should wait here, not after the first question.
            memory.flush()
            self.shelves[name] = Shelf(name, memory, library)
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
