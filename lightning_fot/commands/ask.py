"""``lightning ask``: asks a question beside a memory, on disk or of a server, and shows where the model looked."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning_fot.config.attending.renamed import OLD_KEYS
from lightning_fot.config.memory import OF_THE_MACHINE
from lightning_fot.errors import SettingError
from lightning_fot.library.answer import Answer
from lightning_fot.library.library import Library, Saved, count, existing
from lightning_fot.library.remote import Remote
from lightning_fot.pretrained.quiet import quietly
from lightning_fot.request.api_key import read_key
from lightning_fot.request.model import settings_with
from lightning_fot.request.request import RETRIEVER, make_request
from lightning_fot.request.words import Option, Verb, assignments, read

if TYPE_CHECKING:
    from lightning_fot.library.answering import Answerer

NOTE = "where the model looked, not what made it answer so"
# How a memory is asked is free; all else says how its pairs came about.
_FREE = ("top_k", "retriever", "window", "overlap", "sink_tokens", "last_context_length", *OF_THE_MACHINE)
# Scores divided by less overflow.
_COLDEST = 0.001
_PASSAGE_TOKENS = 64
_OPTIONS = (
    Option("max_new_tokens", "longest answer (default 100)", int, 100),
    Option("temperature", "sample, at this temperature (default: greedy)", float),
    Option("top_p", "sample among the likeliest tokens of this joint probability", float),
    Option("top_k_tokens", "sample among this many likeliest tokens", int),
    Option("seed", "of sampling (default: a new one each time)", int),
    Option("passages", "passages shown, 0 for none (default 5)", int, 5),
    Option("passage_tokens", "tokens of a passage (default 64)", int, _PASSAGE_TOKENS),
    Option("quotes", "passages read once more before the question (default: as the model is asked)", int),
    Option("raw", "continue the text as it is, without the chat template", None, False),
    Option("url", "ask this server of `serve`, where MEMORY is a name; no model is loaded here", str),
    Option("api_key", "of that server", str),
    Option("api_key_file", "file with that key, which others do not see among the processes", str, metavar="FILE"),
    Option("json", "print one JSON object instead, when the answer is complete", None, False),
)
VERB = Verb(
    "lightning ask",
    _OPTIONS,
    settings=("model.",),
    plain=("MEMORY", "[QUESTION…]"),
    plain_about=(
        "a name below memories/, or a folder; with --url a name of that server",
        "- reads it from standard input",
    ),
    about="Asks a memory that `ingest` made, and shows the passages that the answer attended to.",
    epilog=f"Settings of the memory that may be given: {', '.join(f'--model.memory.{name}' for name in _FREE)}.\n"
    "Without a question, on a terminal: a conversation, one line a question; an empty line or Ctrl-D ends it.\n"
    "A single question is searched exactly; a conversation first builds the memory's own index. Nothing that is asked "
    "or answered is added to the memory on disk.\n"
    "With --url a running `serve` answers, by its own settings of the memory.\n\n"
    f"The passages are those that the answer's tokens attended to, across memory layers and heads: {NOTE}.",
)


def ask(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``ask``.
        program: How it was called.
        debug: Leave the libraries' log lines on.

    Returns:
        Exit code: 0, or 130 and 143 when stopped by a signal.

    Raises:
        SettingError: An argument, the question or the memory cannot be used.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    options = given.options
    _check(options)
    memory, *asked = given.plain
    key = read_key(options.api_key, options.api_key_file)
    if options.url is not None:
        return _ask_server(memory, asked, options, given.settings, key)
    if key is not None:
        raise SettingError("api_key", "…", "is that of a server, and none is named", "Give --url.")
    library = existing(memory)
    library.refuse_foreign(given=any(name == RETRIEVER for name, _ in assignments(given.settings)))
    if not Saved.read(library.path).stored:
        raise SettingError(
            "MEMORY", str(library.path), "is empty", f"Read documents: {_ingest(program)} {memory} PATH…"
        )
    library.model = _with(library, given.settings, program)
    library.model.check()
    question = _question(asked, options.json)
    if question is not None and not any(word.startswith("--model.memory.retriever") for word in given.settings):
        # An index takes minutes to build for a million tokens; a single question is answered sooner without.
        library.model = replace(library.model, memory={**library.model.memory, "retriever": "exact"})

    def answer() -> int:
        with quietly(debug):
            return _answer(library, options, question)

    return _stoppable(answer)


def _ask_server(
    memory: str, asked: Sequence[str], options: SimpleNamespace, settings: Sequence[str], key: str | None
) -> int:
    """Asks a memory of a server."""
    given = [("top_k_tokens", options.top_k_tokens), *assignments(settings)]
    if options.passage_tokens != _PASSAGE_TOKENS:
        given.append(("passage_tokens", options.passage_tokens))
    for name, value in given:
        if value is not None:
            raise SettingError(name, value, "cannot be chosen when a server is asked", "Leave it out.")
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    remote = Remote(
        options.url, memory, **sampling, passages=options.passages, quotes=options.quotes, raw=options.raw, key=key
    )
    question = _question(asked, options.json)

    def answer() -> int:
        held = remote.look()
        if held is not None:
            _say(f"{count(held['tokens'], 'token')} of {count(held['documents'], 'document')} at {options.url}.\n")
        about = {"memory": memory, "url": options.url}
        return _answer_with(remote, options, question, about, {})

    return _stoppable(answer)


def _ingest(program: str) -> str:
    return f"{program.removesuffix('ask')}ingest"


def _check(options: SimpleNamespace) -> None:
    limits: tuple[tuple[str, float, float], ...] = (
        ("max_new_tokens", 1, float("inf")),
        ("top_k_tokens", 1, float("inf")),
        ("seed", 0, 2**63 - 1),
        ("passages", 0, float("inf")),
        ("quotes", 0, float("inf")),
        ("passage_tokens", 1, float("inf")),
    )
    for name, least, most in limits:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise SettingError(name, value, f"must be at least {least:.0f}", "Correct it.")
    if options.temperature is not None and not _COLDEST <= options.temperature < float("inf"):
        raise SettingError(
            "temperature", options.temperature, f"must be at least {_COLDEST}", "Leave it out for the greedy answer."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise SettingError("top_p", options.top_p, "must be above 0 and at most 1", "Try 0.9.")


def _with(library: Library, settings: list[str], program: str) -> Any:
    """The library's model with the settings that the command line names, if they may differ."""
    model = library.model
    if not settings:
        return model
    fixed = {*model.memory, *OLD_KEYS} - set(_FREE)
    for key, value in assignments(settings):
        name = key.removeprefix("model.memory.").partition(".")[0]
        if not key.startswith("model.memory.") or name in fixed:
            raise SettingError(
                key, value, f"is fixed by what wrote {library.path}",
                f"Leave it out; free are {', '.join(_FREE)}.",
            )  # fmt: skip
    return settings_with(model, make_request("ask", [], settings, program))


def _question(asked: Sequence[str], alone: bool) -> str | None:
    """The question, None for a conversation.

    Args:
        asked: Its words.
        alone: Whether there has to be one.

    Raises:
        SettingError: It is empty, no text, or missing where nobody can be asked.
    """
    if not asked:
        if alone or not sys.stdin.isatty():
            raise SettingError("question", None, "is missing", "Give one, or - to read it from standard input.")
        return None
    try:
        text = sys.stdin.read() if asked == ["-"] else " ".join(asked)
        text.encode("utf-8")
    except UnicodeError as error:
        raise SettingError("question", "-", f"is not UTF-8 ({error})", "Convert it.") from error
    if not text.strip():
        raise SettingError("question", text, "is empty", "Ask something.")
    return text.strip()


def _stoppable(answer: Callable[[], int]) -> int:
    """What comes of an answer: its exit code, or that of the signal that stopped it."""
    from lightning_fot.system.signals import StopGuard, Stopped

    with StopGuard(_say) as guard:
        del guard  # a signal stops at once: there is nothing to save
        try:
            return answer()
        except Stopped as stopped:
            sys.stdout.flush()
            _say("\nStopped.")
            return stopped.exit_code


def _answer(library: Library, options: SimpleNamespace, question: str | None) -> int:
    _say(f"Loading {library.model.backbone} and {library.path} …")
    from lightning_fot.library.answering import Answerer, AnswerSettings
    from lightning_fot.training.opening import open_model

    lm, tokenizer = open_model(library.model)
    memory = library.load(lm)
    # Whoever waits should wait here, not after the question.
    memory.flush()
    wanted = {name: getattr(options, name) for name in AnswerSettings.__dataclass_fields__}
    answerer = Answerer(lm, tokenizer, memory, AnswerSettings(**wanted))
    unread = sum(not document.done for document in library.documents)
    _say(
        f"{count(len(memory), 'token')} of {count(len(memory.documents), 'document')}"
        + (f"; {unread:,} not read to the end yet" if unread else "")
        + ".\n"
    )
    return _answer_with(answerer, options, question, {"memory": str(library.path)}, {"model": asdict(library.model)})


def _answer_with(
    answerer: Answerer | Remote,
    options: SimpleNamespace,
    question: str | None,
    before: dict[str, Any],
    after: dict[str, Any],
) -> int:
    """Answers a question, or a conversation, with what a JSON object says before the answer and after it."""
    if question is None:
        return _talk(answerer)
    if options.json:
        answer = asdict(answerer.ask(question))
        print(json.dumps({"schema": 1, **before, **answer, "note": f"Passages: {NOTE}.", **after}, indent=2))
        return 0
    _show(_shown(answerer, question))
    return 0


def _shown(answerer: Answerer | Remote, question: str) -> Answer:
    """Answers a question on screen."""
    written = False

    def write(text: str) -> None:
        nonlocal written
        written = True
        _write(text)

    try:
        return answerer.ask(question, write)
    except SettingError:
        if written:  # what is wrong gets a line of its own
            print(flush=True)
        raise


def _talk(answerer: Answerer | Remote) -> int:
    """Asks for questions until there is none."""
    with suppress(ImportError):  # not on this system
        import readline  # noqa: F401  (lines can be edited and called back)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        except UnicodeDecodeError:
            _say("This line is not UTF-8.")
            continue
        if not question:
            return 0
        _show(_shown(answerer, question))
        print()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(_printable(text), end="", flush=True)


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _show(answer: Answer) -> None:
    """Prints what comes after an answer, which is on screen already."""
    print("" if answer.text else "(The model ended its answer at once.)")
    if not answer.complete:
        _say("(Cut at --max_new_tokens.)")
    if answer.passages is None:
        return
    print(f"\nPassages that the answer attended to ({NOTE}):" if answer.passages else "\nIt attended to no passage.")
    width = min(100, shutil.get_terminal_size().columns)
    for number, passage in enumerate(answer.passages, start=1):
        print(
            f"{number}. {_printable(passage.document)}, tokens {passage.start:,} to {passage.stop:,} of "
            f"{passage.tokens:,}: {passage.share:.1%} of the attention to the memory"
        )
        text = _printable(" ".join(passage.text.split()))
        print(textwrap.fill(text, width, initial_indent="   ", subsequent_indent="   "))
