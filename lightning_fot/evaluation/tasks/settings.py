"""What can be set of each task, as ``evaluation.<task>``. Only the standard library is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from lightning_fot.errors import SettingError

# A record is ten tokens, <k> k1..k4 <v> v1..v4; beside the symbols there are three markers.
RECORD_TOKENS = 10
MARKERS = 3

SettingsT = TypeVar("SettingsT", bound="TaskSettings")


@dataclass
class TaskSettings:
    """What all tasks have.

    Args:
        tokens: Tokens in memory, or of the whole prompt where a task says so; each is measured.
        seed: Of all that is drawn.

    Raises:
        SettingError: A value is out of its range.
    """

    name: ClassVar[str]

    tokens: list[int]
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, list) or not self.tokens:
            raise self.error("tokens", "must be a list of lengths", "Write [16384, 65536].")
        for value in self.tokens:
            if not _whole(value, 1):
                raise self.error("tokens", f"{value!r} is not a whole number above 0", "Correct it.")
        self._check_whole(0, "seed")

    @property
    def lengths(self) -> list[int]:
        """Lengths, each once, ascending."""
        return sorted(set(self.tokens))

    def check(self, window: int) -> None:
        """Finds what cannot work with the model's window.

        Raises:
            SettingError: Something cannot.
        """

    def tokens_to_read(self, length: int) -> int:
        """Tokens that go into the memory for one length, beyond what shorter lengths left there."""
        raise NotImplementedError

    def tokens_to_ask(self, length: int) -> int:
        """Tokens of all questions of one length."""
        raise NotImplementedError

    def error(self, setting: str, problem: str, fix: str) -> SettingError:
        """The error for one of the settings."""
        return SettingError(f"evaluation.{self.name}.{setting}", getattr(self, setting), problem, fix)

    def _check_whole(self, minimum: int, *names: str) -> None:
        for name in names:
            if not _whole(getattr(self, name), minimum):
                raise self.error(name, f"must be a whole number of at least {minimum}", "Correct it.")


@dataclass
class DictionaryTask(TaskSettings):
    """The paper's dictionary lookup at any size: one memory of records grows, and at each size the same are asked for.

    The model has to know the task: see ``kind: dictionary`` of ``data.sources``.

    Args:
        tokens: Tokens of records in memory.
        seed: Of keys, values and questions; training never draws these documents.
        questions: Records asked for, all of the smallest memory.
        vocabulary: As that of the training source.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "dictionary"

    tokens: list[int] = field(default_factory=lambda: [16384, 65536])
    questions: int = 256
    vocabulary: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "questions")
        self._check_whole(MARKERS + 2, "vocabulary")
        distinct = (self.vocabulary - MARKERS) ** 4
        if max(self.tokens) // RECORD_TOKENS > distinct:
            raise self.error("vocabulary", f"gives {distinct} different keys", "Raise it, or lower tokens.")

    def records(self, length: int, window: int) -> int:
        """Records in ``length`` tokens of whole windows, each after a start token."""
        return length // window * ((window - 1) // RECORD_TOKENS)

    def check(self, window: int) -> None:
        """Refuses a window without room, and more questions than the smallest memory has records."""
        least = RECORD_TOKENS + 1
        if window < least:
            raise SettingError("model.memory.window", window, f"a record takes {least} tokens", f"Use {least} or more.")
        held = self.records(min(self.tokens), window)
        if held < self.questions:
            problem = f"the smallest memory of {min(self.tokens)} tokens holds {held} records in windows of {window}"
            raise self.error("questions", problem, "Ask fewer, or raise the smallest of tokens.")

    def tokens_to_read(self, length: int) -> int:
        """What the next smaller length lacks."""
        return length - max((other for other in self.lengths if other < length), default=0)

    def tokens_to_ask(self, length: int) -> int:
        """The questions, each with its answer."""
        return self.questions * RECORD_TOKENS


TASKS: tuple[type[TaskSettings], ...] = (DictionaryTask,)


def read_task(kind: type[SettingsT], given: Any) -> SettingsT | None:
    """Settings from what a configuration file holds, a mapping; settings and None stay.

    Raises:
        SettingError: It is something else, has an unknown key, or a value is out of its range.
    """
    if given is None or isinstance(given, kind):
        return given
    name = f"evaluation.{kind.name}"
    known = [one.name for one in dataclasses.fields(kind)]
    if not isinstance(given, Mapping):
        raise SettingError(name, given, "is not a mapping", f"Give some of {', '.join(known)}.")
    for key in given:
        if key not in known:
            raise SettingError(f"{name}.{key}", given[key], "is not a setting", f"Known here: {', '.join(known)}.")
    return kind(**given)


def _whole(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
