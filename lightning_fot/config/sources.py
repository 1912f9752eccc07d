"""The kinds of source that a mixture is made of, and their settings. Only the standard library is imported here, so a
wrong setting is told before torch or a model is loaded.

A source is written as a mapping: ``{kind: text, paths: [books/], weight: 3, min_tokens: 4096}``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_fot.errors import MissingLibraryError, SettingError, close_match

# <k>, <v> and <q>; a key and a value have four symbols each.
MARKERS = 3
RECORD_TOKENS = 10
# Settings of the data module that sources of kind text take, where they have none of their own.
FOR_TEXT = ("paths", "heldout", "max_documents", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What all sources have.

    Args:
        setting: Where it was set, such as ``data.sources[0]``; not a key of the mapping.
        weight: Share of the tokens that are read, beside the other sources' weights.
    """

    kind: ClassVar[str]
    setting: str
    weight: float = 1.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Keys that its mapping may have beside ``kind``."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "setting")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                raise self.error(field.name, "must have a value", f"Leave it out for {field.default!r}.")
        self._check_numbers(0.0, "weight", above=True)

    def error(self, name: str, problem: str, fix: str) -> SettingError:
        """The error for one of its settings."""
        return SettingError(f"{self.setting}.{name}", getattr(self, name), problem, fix)

    def _check_whole(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise self.error(name, f"must be a whole number of at least {minimum}", "Correct it.")

    def _check_numbers(self, low: float, *names: str, above: bool = False, high: float = math.inf) -> None:
        for name in names:
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (fits and (value > low if above else value >= low) and value < high):
                end = "" if high == math.inf else f" and below {high:g}"
                raise self.error(name, f"must be a number {'above' if above else 'of at least'} {low:g}{end}", "Try 1.")

    def _check_texts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise self.error(name, "must be a text", "Correct it.")

    def _check_list(self, name: str) -> None:
        """A list of texts; a single one stands for a list of one."""
        value = getattr(self, name)
        if isinstance(value, str):
            object.__setattr__(self, name, [value])
        elif value is not None and not (
            isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        ):
            raise self.error(name, "must be a list of files and folders", f"Write {name}: [folder, file.txt].")


@dataclass(frozen=True, kw_only=True)
class FiniteSettings(SourceSettings):
    """What sources have whose documents come to an end; None takes the data module's own setting.

    Args:
        passes: How often each document is read at most; None reads them again as long as the training goes on.
        min_tokens: Documents with fewer tokens are left out.
        heldout_fraction: Share of the documents that training never sees.
    """

    passes: int | None = None
    min_tokens: int | None = None
    heldout_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "passes")
        self._check_whole(2, "min_tokens")
        self._check_numbers(0.0, "heldout_fraction", above=True, high=1.0)


@dataclass(frozen=True, kw_only=True)
class TextSettings(FiniteSettings):
    """``kind: text``: files and folders; each key as the data module's of that name, which None takes.

    Args:
        paths: Files and folders; where the data module has none either, the standard library's sources.
        heldout: Files and folders of held-out documents; None takes them out of paths.
        max_documents: Documents used at most.
        max_document_tokens: Tokens after which training and validation cut a document.
        max_tokens: Tokens of training documents used at most.
        text_field: Key of the text in .jsonl objects.
    """

    kind = "text"
    paths: list[str] | None = None
    heldout: list[str] | None = None
    max_documents: int | None = None
    max_document_tokens: int | None = None
    max_tokens: int | None = None
    text_field: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_list("paths")
        self._check_list("heldout")
        self._check_whole(1, "max_documents")
        self._check_whole(2, "max_document_tokens", "max_tokens")
        self._check_texts("text_field")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSettings(FiniteSettings):
    """``kind: huggingface``: rows of a data set of the library ``datasets``.

    Args:
        dataset: Hub id, folder, or a format such as ``json`` with ``data_files``.
        name: Configuration of the data set.
        split: Which split.
        data_files: Files of it.
        revision: Branch, tag or commit on the hub.
        streaming: Read rows as they are needed, without downloading the whole.
        shuffle_buffer: Rows among which the next one is drawn with the seed; 1 keeps the data set's order.
        max_document_tokens: Tokens after which training and validation cut a document.
        text_field: Column of the text.
    """

    kind = "huggingface"
    dataset: str = ""
    name: str | None = None
    split: str = "train"
    data_files: list[str] | None = None
    revision: str | None = None
    streaming: bool = True
    shuffle_buffer: int = 100
    max_document_tokens: int | None = None
    text_field: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_texts("dataset", "name", "split", "revision", "text_field")
        self._check_list("data_files")
        self._check_whole(1, "shuffle_buffer")
        self._check_whole(2, "max_document_tokens")
        if not isinstance(self.streaming, bool):
            raise self.error("streaming", "must be true or false", "Correct it.")


@dataclass(frozen=True, kw_only=True)
class InstructionsSettings(FiniteSettings):
    """``kind: instructions``: conversations, in .jsonl files; the loss counts the assistant's answers only.

    A line is ``{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}``, and may have
    ``"documents": […]``: texts that are put before the first user's question.

    Args:
        paths: .jsonl files, and folders of them.
        chat_template: Jinja template, or a file of it; None takes the tokenizer's.
    """

    kind = "instructions"
    paths: list[str] | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_list("paths")
        if self.paths is None:
            raise self.error("paths", "is missing", "Name .jsonl files of conversations.")
        self._check_texts("chat_template")


@dataclass(frozen=True, kw_only=True)
class PasskeySettings(SourceSettings):
    """``kind: passkey``: a number told in a long irrelevant text and asked for at its end, without end.

    Args:
        tokens: Tokens of a document.
        answer_only: Whether the loss counts the number alone, and not the sentences around it.
        seed: Of the draw, beside the data module's.
    """

    kind = "passkey"
    tokens: int = 2048
    answer_only: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(32, "tokens")
        self._check_whole(0, "seed")
        if not isinstance(self.answer_only, bool):
            raise self.error("answer_only", "must be true or false", "Correct it.")


@dataclass(frozen=True, kw_only=True)
class DictionarySettings(SourceSettings):
    """``kind: dictionary``: the dictionary lookup of the Focused Transformer paper (appendix), without end.

    Args:
        tokens: Tokens of a document: its first half defines records, its second half asks for them.
        records: Distinct records of a document; a list goes in straight lines from each number to the next; None takes
            as many as half a document holds. Fewer than that are defined several times.
        grow_documents: Documents from the first number of ``records`` to the last.
        similar: Share of the records whose key is that of an earlier record but for one symbol. Random keys are told
            apart by two symbols of four as long as records are few; in a memory of millions that is not enough.
        key_symbols: Symbols that a place of a key can have, drawn anew for each place and for every ``key_documents``
            documents; no two of these documents have a key in common. So keys of different documents lie as close
            together as in a memory that is ``((vocabulary - 3) / key_symbols) ** 4`` times as large. None: all symbols.
        key_documents: Documents in a row that share these symbols: those of a batch.
        ask: Which questions the loss counts: ``all``, or the ``first`` about each record. Where a record is asked for
            again, the answer can be copied from the local window, so that ``all`` also rewards what is no lookup.
        vocabulary: Tokens used: the three markers, and symbols.
        seed: Of the draw, beside the data module's.
    """

    kind = "dictionary"
    tokens: int = 512
    records: int | list[int] | None = None
    grow_documents: int = 10_000
    similar: float = 0.0
    key_symbols: int | None = None
    key_documents: int = 32
    ask: Literal["all", "first"] = "all"
    vocabulary: int = 64
    seed: int = 0

    @property
    def most_records(self) -> int:
        """Distinct records of a document, at most."""
        if isinstance(self.records, list):
            return max(self.records)
        return self.room if self.records is None else self.records

    @property
    def room(self) -> int:
        """Records in half a document, next to a start or an end token."""
        return (self.tokens // 2 - 1) // RECORD_TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(2 * (RECORD_TOKENS + 1), "tokens")
        self._check_whole(0, "seed")
        self._check_whole(1, "grow_documents")
        self._check_whole(MARKERS + 2, "vocabulary")
        self._check_numbers(0.0, "similar", high=1.0)
        if self.ask not in ("all", "first"):
            raise self.error("ask", "is not known", "Choose all or first.")
        given = self.records if isinstance(self.records, list) else [self.records]
        for count in given:
            if count is None and given is not self.records:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= self.room:
                raise self.error("records", f"must be from 1 to {self.room}, what half a document holds", "Correct it.")
        if isinstance(self.records, list) and len(self.records) < 2:
            raise self.error("records", "must be a number or a list of two or more", "Write [1, 25].")
        distinct = (self.vocabulary - MARKERS) ** 4
        if distinct < self.room:
            raise self.error("vocabulary", f"gives {distinct} different keys for {self.room} records", "Raise it.")
        self._check_whole(1, "key_documents")
        if self.key_symbols is not None:
            self._check_key_symbols(self.key_symbols)

    def _check_key_symbols(self, symbols: int) -> None:
        self._check_whole(1, "key_symbols")
        if symbols > self.vocabulary - MARKERS:
            raise self.error("key_symbols", f"is more than the {self.vocabulary - MARKERS} symbols", "Lower it.")
        documents, records = self.key_documents, self.most_records
        if symbols**4 < documents * records:
            problem = f"gives {symbols**4} different keys for {documents} documents of {records} records"
            raise self.error("key_symbols", problem, f"Raise it, or lower {self.setting}.key_documents.")
        if self.similar:
            fix = "With key_symbols keys are close together already: set similar to 0, or leave key_symbols out."
            raise self.error("similar", "cannot be had together with key_symbols", fix)


@dataclass(frozen=True, kw_only=True)
class MadeOfTextSettings(SourceSettings):
    """What sources have that make documents from real text; the loss counts what earlier windows tell.

    Args:
        tokens: Tokens of a document: w + 1 windows in layout ``paper``, a pack in layout ``packed``.
        ask_tokens: Tokens at its end in which is asked: a window.
        paths: Files and folders of the text; None takes the standard library's sources.
        seed: Of the draw, beside the data module's.
    """

    tokens: int = 768
    ask_tokens: int = 256
    paths: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(128, "tokens")
        self._check_whole(32, "ask_tokens")
        self._check_whole(0, "seed")
        self._check_list("paths")
        if self.tokens - self.ask_tokens < 64:
            fix = f"Lower it, or raise {self.setting}.tokens."
            raise self.error("ask_tokens", f"leaves fewer than 64 of {self.tokens} tokens to tell in", fix)


@dataclass(frozen=True, kw_only=True)
class FactsSettings(MadeOfTextSettings):
    """``kind: facts``: names and values told between stretches of text and asked for at the end, without end.

    Args:
        facts: Facts of a document, as far as they find room; a list of two goes in a straight line from one to the
            other.
        grow_documents: Documents from the first number of ``facts`` to the last.
        relations: Sentences that the facts of a document share, drawn from one number to the other: with one, only
            the names tell facts apart.
        other_words: Share of the questions that are asked in other words than the fact was told in.
        together: Documents in a row that share relations and have no name in common: those of a batch.
        chat: Share of the documents in which a user asks an assistant, in the tokenizer's chat template.
    """

    kind = "facts"
    facts: int | list[int] = 16
    grow_documents: int = 1
    relations: list[int] = dataclasses.field(default_factory=lambda: [1, 4])
    other_words: float = 0.5
    together: int = 8
    chat: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(1, "grow_documents", "together")
        self._check_numbers(0.0, "other_words", "chat")
        for name in ("other_words", "chat"):
            if getattr(self, name) > 1:
                raise self.error(name, "must be a share from 0 to 1", "Try 0.5.")
        self._check_pair("facts", [self.facts, self.facts] if isinstance(self.facts, int) else self.facts)
        self._check_pair("relations", self.relations)
        if self.relations[0] > self.relations[1]:
            raise self.error("relations", "must go from a number to one that is no smaller", "Write [1, 4].")

    def _check_pair(self, name: str, value: object) -> None:
        whole = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        if not whole or not isinstance(value, list) or len(value) != 2 or min(value) < 1:
            raise self.error(name, "must be two whole numbers of at least 1", "Write [1, 4].")

    @property
    def facts_range(self) -> tuple[int, int]:
        """Facts of the first and of later documents."""
        first, last = [self.facts, self.facts] if isinstance(self.facts, int) else self.facts
        return first, last

    @property
    def relations_range(self) -> tuple[int, int]:
        """Relations of a document, at least and at most."""
        return self.relations[0], self.relations[1]


@dataclass(frozen=True, kw_only=True)
class RecallSettings(MadeOfTextSettings):
    """``kind: recall``: real text whose earlier passages are quoted again at its end, without end.

    Args:
        quote_tokens: Tokens of a quotation; the first eight say which it is, and the loss counts the others.
        whole: Share of the documents whose earlier windows count too: what a model says beside an empty memory must
            not suffer. Each costs a batch of its own in layout ``paper``.
    """

    kind = "recall"
    quote_tokens: int = 32
    whole: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole(16, "quote_tokens")
        self._check_numbers(0.0, "whole")
        if self.whole > 1:
            raise self.error("whole", "must be a share from 0 to 1", "Try 0.3.")
        if self.quote_tokens > min(self.ask_tokens // 2, self.tokens - self.ask_tokens - 8):
            fix = f"Lower it, or raise {self.setting}.ask_tokens and {self.setting}.tokens."
            raise self.error("quote_tokens", "is more than half of ask_tokens, or than what is told", fix)


KINDS: dict[str, type[SourceSettings]] = {
    one.kind: one
    for one in (
        TextSettings,
        HuggingFaceSettings,
        DictionarySettings,
        PasskeySettings,
        InstructionsSettings,
        FactsSettings,
        RecallSettings,
    )
}


def read_sources(sources: object, setting: str = "data.sources") -> list[SourceSettings]:
    """The settings of a mixture's sources, each checked as far as they alone tell.

    Args:
        sources: A list of mappings with ``kind`` and the keys of that kind.
        setting: Its name in errors.

    Raises:
        SettingError: It is no such list, or names an unknown kind or key, or a value is out of its range.
    """
    if not isinstance(sources, list) or not sources:
        raise SettingError(
            setting, sources, "must be a list of sources", "Write [{kind: text, paths: [books/]}, {kind: passkey}]."
        )
    return [_read_source(source, f"{setting}[{number}]") for number, source in enumerate(sources)]


def check_taken(settings: Mapping[str, object], sources: Sequence[SourceSettings]) -> None:
    """Refuse settings of ``data`` that no source of a mixture takes.

    Args:
        settings: Those of the data module, by name.
        sources: Of the mixture.

    Raises:
        SettingError: One of ``FOR_TEXT`` is set, and each source of kind text has its own, or there is none.
    """
    texts = [source for source in sources if isinstance(source, TextSettings)]
    for name in FOR_TEXT:
        if settings.get(name) is not None and all(getattr(source, name) is not None for source in texts):
            raise SettingError(
                f"data.{name}",
                settings[name],
                f"is taken by no source: {'each has its own' if texts else 'none is of kind text'}",
                "Add {kind: text} to data.sources; or set data.sources=null.",
            )


def missing_datasets(source: HuggingFaceSettings, reason: str | None = None) -> MissingLibraryError:
    """The error where the library ``datasets`` cannot be imported."""
    return MissingLibraryError(
        "datasets", "pip install 'lightning-fot[datasets]'", f"{source.setting} (kind huggingface)", reason
    )


def _read_source(source: object, setting: str) -> SourceSettings:
    if not isinstance(source, Mapping):
        raise SettingError(setting, source, "must hold settings", "Write {kind: text, paths: [books/]}.")
    kind = source.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        problem = "is missing" if kind is None else "is not known"
        raise SettingError(
            f"{setting}.kind", kind, problem, f"{close_match(str(kind), KINDS)}Kinds: {', '.join(KINDS)}."
        )
    known = KINDS[kind].names()
    for key in source:
        if key not in (*known, "kind"):
            raise SettingError(
                f"{setting}.{key}",
                source[key],
                f"is not a setting of kind {kind}",
                f"{close_match(str(key), known)}Its settings: {', '.join(known)}.",
            )
    given: dict[str, Any] = {str(key): value for key, value in source.items() if key != "kind"}
    if kind == HuggingFaceSettings.kind and "dataset" not in given:
        raise SettingError(f"{setting}.dataset", None, "is missing", "Name a data set, such as allenai/c4.")
    return KINDS[kind](setting=setting, **given)
