"""What can be set of each task, as ``evaluation.<task>``. Only the standard library is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lightning_fot.errors import SettingError

# A record is ten tokens, <k> k1..k4 <v> v1..v4; beside the symbols there are three markers.
RECORD_TOKENS = 10
MARKERS = 3
# Facts that the task lookup has names for: twelve of each of four kinds.
MOST_FACTS = 48

SettingsT = TypeVar("SettingsT", bound="TaskSettings")


@dataclass
class TaskSettings:
    """What all tasks have.

    Args:
        tokens: Tokens in memory; each length is measured.
        seed: Of all that is drawn.

    Attributes:
        name: Of the task and its setting.
        without_memory: Whether it is also measured without a memory.

    Raises:
        SettingError: A value is out of its range.
    """

    name: ClassVar[str]
    without_memory: ClassVar[bool] = True

    tokens: list[int]
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_list("tokens")
        self._check_whole(0, "seed")

    @property
    def lengths(self) -> list[int]:
        """Lengths, each once, ascending."""
        return sorted(set(self.tokens))

    def texts(self, window: int) -> tuple[int, int]:
        """How many held-out documents of the user's text it takes, and of how many tokens at least."""
        return 0, 0

    @property
    def text_tokens(self) -> int:
        """Tokens that documents of running text must have together; 0 where none is taken."""
        return 0

    @property
    def text_paths(self) -> list[str] | None:
        """Files and folders of that text; None for held-out documents."""
        return None

    def reads_whole(self, length: int) -> bool:
        """Whether it is also measured with a text of this length in the backbone's own context."""
        return False

    def check(self, window: int) -> None:
        """Finds what cannot work with the model's window.

        Raises:
            SettingError: Something cannot.
        """

    def tokens_to_read(self, length: int) -> int:
        """Tokens that go into the memory for one length: here what the next smaller length lacks."""
        return length - max((other for other in self.lengths if other < length), default=0)

    def tokens_to_ask(self, length: int) -> int:
        """Tokens of all questions of one length."""
        # Not an abstract method: jsonargparse writes dataclasses with other bases as class_path and init_args.
        raise NotImplementedError

    def error(self, setting: str, problem: str, fix: str) -> SettingError:
        """The error for one of the settings."""
        return SettingError(f"evaluation.{self.name}.{setting}", getattr(self, setting), problem, fix)

    def _check_list(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list) or not value:
            raise self.error(name, "must be a list of numbers", "Write [1024, 4096], or one number in brackets.")
        for one in value:
            if not _whole(one, 1):
                raise self.error(name, f"{one!r} is not a whole number above 0", "Correct it.")

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

    def tokens_to_ask(self, length: int) -> int:
        """The questions, each with its answer."""
        return self.questions * RECORD_TOKENS


@dataclass
class DistractionTask(TaskSettings):
    """Whose keys the attention goes to when the memory holds several documents: the paper's r_d (section 3.3).

    Args:
        tokens: Tokens of each document that are in the memory.
        documents: Numbers d of documents in the memory; each is measured.
        scored: Documents whose next window asks.
        seed: Unused: documents come in the order of the held-out ones.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "distraction"
    without_memory = False

    tokens: list[int] = field(default_factory=lambda: [1024])
    documents: list[int] = field(default_factory=lambda: [2, 4, 8])
    scored: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_list("documents")
        self._check_whole(1, "scored")

    @property
    def counts(self) -> list[int]:
        """Numbers of documents, each once, ascending."""
        return sorted(set(self.documents))

    def texts(self, window: int) -> tuple[int, int]:
        """Enough for whole groups of each number of documents."""
        return max(-(-self.scored // count) * count for count in self.documents), max(self.tokens) + window

    def tokens_to_read(self, length: int) -> int:
        """Each document once."""
        return length * self.texts(1)[0]

    def tokens_to_ask(self, length: int) -> int:
        """About a window of 256 of each document, for each number of them."""
        return 256 * self.scored * len(self.counts)


@dataclass
class ManyShotTask(TaskSettings):
    """Many-shot classification: the same questions behind more and more labelled examples in the memory.

    Args:
        tokens: Tokens of examples in memory; whole ones, as many as the file has.
        seed: Of the order of the examples, and of which are asked for.
        path: File of lines ``LABEL text`` or ``LABEL:sub text``, as TREC's.
        questions: Examples that are asked for and never shown.
        local: Examples in the local window before each question, as far as they fit; not in the memory.
        fine: Whether the label includes what follows its colon.

    Raises:
        SettingError: A value is out of its range, or there is no such file.
    """

    name = "many_shot"

    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    path: str = ""
    questions: int = 64
    local: int = 4
    fine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "questions")
        self._check_whole(0, "local")
        if not isinstance(self.path, str) or not Path(self.path).expanduser().is_file():
            raise self.error("path", "is no file", "Give a file of lines LABEL text.")

    def tokens_to_ask(self, length: int) -> int:
        """About thirty tokens an example."""
        return self.questions * 30 * (1 + self.local)


@dataclass
class SampledTask(TaskSettings):
    """A task of several texts of each length, every one in a memory of its own.

    Args:
        tokens: Tokens of each text.
        seed: Of all that is drawn.
        samples: Texts of each length.

    Raises:
        SettingError: A value is out of its range.
    """

    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "samples")

    def tokens_to_read(self, length: int) -> int:
        """Every text."""
        return length * self.samples


@dataclass
class NeedlesTask(SampledTask):
    """Several pass keys in one text, some of them asked for, each by its name.

    Args:
        tokens: Tokens of each text, all in memory.
        seed: Of names, numbers and what is asked for.
        keys: Pass keys in a text, at even depths.
        asked: Of them asked for, each on its own.
        samples: Texts of each length.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "needles"

    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    keys: int = 4
    asked: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "keys", "asked")
        if self.keys > 100:
            raise self.error("keys", "are told apart by 100 names", "Use 100 or fewer.")

    def tokens_to_ask(self, length: int) -> int:
        """About 25 tokens a question."""
        return 25 * self.samples * min(self.asked, self.keys)


@dataclass
class KeyValueTask(TaskSettings):
    """Questions on one of many short documents, each with four facts about one person; ten answers to choose among.

    Args:
        tokens: Tokens of documents in memory.
        seed: Of names, facts and questions.
        questions: Asked, all about documents of the smallest memory.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "key_value"

    tokens: list[int] = field(default_factory=lambda: [2048, 8192])
    questions: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "questions")

    def tokens_to_ask(self, length: int) -> int:
        """About 25 tokens a question."""
        return 25 * self.questions


@dataclass
class LookupTask(TaskSettings):
    """Facts told once each in real text, asked for in the words they were told in and in other words.

    Args:
        tokens: Tokens of each text, all in memory.
        seed: Of names, values, and their order.
        facts: Told at even depths, six of the same sentence in 24; each is asked for in both ways.
        paths: Files and folders of the text; None takes held-out documents.
        full_context_tokens: Texts of up to so many tokens are also read into the backbone's own context, as far as its
            positions reach.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "lookup"

    tokens: list[int] = field(default_factory=lambda: [4096, 16384])
    facts: int = 24
    paths: list[str] | None = None
    full_context_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "facts")
        self._check_whole(0, "full_context_tokens")
        if self.facts > MOST_FACTS:
            raise self.error("facts", f"are told apart by {MOST_FACTS} names", f"Use {MOST_FACTS} or fewer.")
        paths: Any = self.paths
        if paths is not None and not (isinstance(paths, list) and paths and all(isinstance(one, str) for one in paths)):
            raise self.error("paths", "must be a list of files and folders", "Write [folder, file.txt].")

    @property
    def text_tokens(self) -> int:
        """Somewhat more than the longest text: blanks and line ends are joined in it."""
        return 2 * max(self.tokens)

    @property
    def text_paths(self) -> list[str] | None:
        """As set."""
        return self.paths

    def reads_whole(self, length: int) -> bool:
        """Up to ``full_context_tokens``."""
        return length <= self.full_context_tokens

    def tokens_to_read(self, length: int) -> int:
        """Each text is another."""
        return length

    def tokens_to_ask(self, length: int) -> int:
        """About 25 tokens a question, read some four times where the answer is wrong."""
        return 25 * 2 * 5 * self.facts


@dataclass
class CommonWordsTask(SampledTask):
    """Aggregation: which word of a long list occurs most often. Top-k memory is known to be weak at it.

    Args:
        tokens: Tokens of each list, all in memory.
        seed: Of words and their order.
        words: Different words, which are the choices too.
        often: How many times as often as any other the common one occurs.
        samples: Lists of each length.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "common_words"

    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    words: int = 8
    often: int = 4
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(2, "words", "often")
        if self.words > 20:
            raise self.error("words", "there are 20", "Use 20 or fewer.")

    def tokens_to_ask(self, length: int) -> int:
        """About 25 tokens a question."""
        return 25 * self.samples


@dataclass
class StoryTask(TaskSettings):
    """Losses of a held-out story's true continuation, by their distance from what is in the memory.

    Args:
        tokens: Tokens before the continuation that are in the memory.
        seed: Unused: documents come in the order of the held-out ones.
        target_tokens: Tokens of the continuation.
        stories: Held-out documents.

    Raises:
        SettingError: A value is out of its range.
    """

    name = "story"

    tokens: list[int] = field(default_factory=lambda: [8192])
    target_tokens: int = 2048
    stories: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "target_tokens", "stories")

    def texts(self, window: int) -> tuple[int, int]:
        """The stories."""
        return self.stories, max(self.tokens) + self.target_tokens + 1

    def tokens_to_read(self, length: int) -> int:
        """The context of each story."""
        return length * self.stories

    def tokens_to_ask(self, length: int) -> int:
        """The continuations."""
        return self.target_tokens * self.stories


TASKS: tuple[type[TaskSettings], ...] = (
    DictionaryTask,
    DistractionTask,
    NeedlesTask,
    KeyValueTask,
    CommonWordsTask,
    ManyShotTask,
    StoryTask,
    LookupTask,
)


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
