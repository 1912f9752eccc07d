"""Conversations as training documents: long documents before the question, and a loss on the answers only.

Reading and checking the files needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.config.sources import InstructionsSettings
from lightning_fot.data.text.parts import walk
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.data.rows.sequences import Mask
    from lightning_fot.data.text.token_cache import Ids
    from lightning_fot.data.text.tokens import TextEncoder

ROLES = ("system", "user", "assistant")
# Stands for a content while the template is applied: private-use characters, which templates leave alone.
_PLACE = "\ue000{number}\ue001"
_PLACES = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Conversation:
    """A line of a ``.jsonl`` file; nothing of it is kept before ``messages`` is used.

    Args:
        path: The file.
        offset: Byte at which the line starts.
        size: Bytes of the line.
    """

    path: str
    offset: int
    size: int

    @property
    def keys(self) -> frozenset[Hashable]:
        """The line itself."""
        return frozenset({(os.path.realpath(self.path), self.offset)})

    def messages(self) -> list[dict[str, str]]:
        """Role and content of each turn; the documents stand before the first user's content."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return _messages(json.loads(file.read(self.size).decode("utf-8-sig")))


def find_conversations(settings: InstructionsSettings) -> list[Conversation]:
    """Conversations under ``paths`` in a fixed order. Every line is checked now: a bad one must not stop training.

    Raises:
        SettingError: A path is missing or no ``.jsonl``, a line is no conversation, or there is none at all.
    """
    found: list[Conversation] = []
    setting = f"{settings.setting}.paths"
    for given in settings.paths or []:
        path = Path(given).expanduser()
        if not path.exists():
            raise SettingError(setting, given, "does not exist", f"Paths are relative to {os.getcwd()}; correct it.")
        if path.is_dir():
            files = [file for _, several in walk(path, set(), Counter()) for file in several]
        else:
            files = [path]
        for file in files:
            if file.suffix.lower() in (".jsonl", ".ndjson"):
                found += _read(file, setting)
            elif file == path:
                raise SettingError(setting, given, "is no .jsonl file", "Write a conversation a line.")
    if not found:
        raise SettingError(setting, settings.paths, "holds no conversation", "Name .jsonl files of conversations.")
    return found


class Template:
    """Turns conversations into ids with a chat template.

    Args:
        encoder: Gives ids, of control tokens too.
        chat_template: Jinja template, or a file of it; None takes the tokenizer's.
        setting: Name of the source, for errors.

    Raises:
        SettingError: There is no template, or the file cannot be read.
    """

    def __init__(self, encoder: TextEncoder, chat_template: str | None, setting: str) -> None:
        self._encoder = encoder
        self._setting = setting
        self._template = chat_template
        if chat_template is not None and "{" not in chat_template:
            try:
                self._template = Path(chat_template).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingError(
                    f"{setting}.chat_template", chat_template, f"cannot be read ({error})", "Correct the path."
                ) from error
        tokenizer = encoder.tokenizer
        if self._template is None and not getattr(tokenizer, "chat_template", None):
            raise SettingError(
                f"{setting}.chat_template",
                None,
                "is missing, and the model's tokenizer has none",
                "Give a Jinja template or a file of it, or take a model that was made for conversations.",
            )
        self._controls = sorted(_control_tokens(tokenizer), key=len, reverse=True)
        self._control_ids = set(getattr(tokenizer, "all_special_ids", ()))

    def encode(self, conversation: Conversation) -> tuple[Ids, Mask] | None:
        """Ids int32 (tokens,), and which the loss counts: the answers, and the control token that ends each.

        None when a content spells out a control token, which must not become one.

        Raises:
            SettingError: The template refuses the conversation, or leaves an answer out.
        """
        import numpy as np

        messages = conversation.messages()
        if any(control in message["content"] for message in messages for control in self._controls):
            return None
        segments = self._segments(conversation, messages)

        def make() -> Ids:
            parts: list[Ids] = []
            before, answered = "", False
            for text, answer in segments:
                ids = np.asarray(self._encoder.encode_controls(text, before[-1:]), np.int32)
                counted = np.full(len(ids), answer)
                if answered:
                    counted[: self._ending(ids)] = True
                # A target is kept as its complement, so that one array on disk holds both.
                parts.append(np.where(counted, ~ids, ids))
                before, answered = text, answer
            return np.concatenate(parts)

        marked = self._encoder.cached(repr(segments), make)
        return np.where(marked < 0, ~marked, marked), marked < 0

    def _ending(self, ids: Any) -> int:
        """How many ids from the front end the answer before: up to a control token among the first two."""
        return next((place + 1 for place, one in enumerate(ids[:2].tolist()) if one in self._control_ids), 0)

    def _segments(self, conversation: Conversation, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """The conversation's text cut before and after each answer: (text, whether it is an answer)."""
        placed = [{"role": one["role"], "content": _PLACE.format(number=number)} for number, one in enumerate(messages)]
        try:
            text: str = self._encoder.tokenizer.apply_chat_template(
                placed, tokenize=False, chat_template=self._template
            )
        except Exception as error:  # a template raises what it likes
            raise self._refused(conversation, f"is refused by the chat template ({error})") from error
        segments: list[tuple[str, bool]] = []
        pending = ""
        seen = set()
        pieces = _PLACES.split(text)
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                pending += piece
                continue
            number = int(piece)
            seen.add(number)
            content = messages[number]["content"].strip()
            if messages[number]["role"] != "assistant":
                pending += content
                continue
            # A space before an answer is part of its first word.
            spaces = len(pending) - len(pending.rstrip(" "))
            segments.append((pending[: len(pending) - spaces], False))
            segments.append((" " * spaces + content, True))
            pending = ""
        if pending:
            segments.append((pending, False))
        if seen != set(range(len(messages))):
            lost = min(set(range(len(messages))) - seen)
            raise self._refused(conversation, f"loses its {messages[lost]['role']} turn in the chat template")
        return [one for one in segments if one[0]]

    def _refused(self, conversation: Conversation, problem: str) -> SettingError:
        place = f"the line at byte {conversation.offset} of {conversation.path}"
        return SettingError(f"{self._setting}.paths", place, problem, "Correct the line, or give another template.")


def _control_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token) for token in added.values()} | set(getattr(tokenizer, "all_special_tokens", ()))


def _read(file: Path, setting: str) -> Iterator[Conversation]:
    offset = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                problem = _problem(json.loads(line.decode("utf-8-sig")))
            except ValueError as error:
                problem = f"is not JSON ({error})"
            if problem:
                raise SettingError(setting, str(file), f"line {number} {problem}", "Correct or remove it.")
            yield Conversation(str(file), start, len(line))


def _problem(record: Any) -> str | None:
    """What is wrong with a line's object."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = f"; its keys are {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else ""
        return f"has no list of messages under the key 'messages'{keys}"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "has a message without a text under the key 'content'"
        if message.get("role") not in ROLES:
            return f"has a message of role {message.get('role')!r} (roles: {', '.join(ROLES)})"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        return "has no answer of an assistant after a user's question"
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        return "has an empty answer"
    documents = record.get("documents", [])
    if not isinstance(documents, (str, list)) or not all(isinstance(one, str) for one in documents):
        return "has 'documents' that are no list of texts"
    return None


def _messages(record: dict[str, Any]) -> list[dict[str, str]]:
    documents = record.get("documents", [])
    before = [documents] if isinstance(documents, str) else documents
    messages = [{"role": one["role"], "content": one["content"]} for one in record["messages"]]
    question = next(one for one in messages if one["role"] == "user")
    question["content"] = "\n\n".join([*(one.strip() for one in before), question["content"].strip()])
    return messages
