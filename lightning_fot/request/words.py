"""The words of a command line, read by the same rules for every verb. Standard library only.

- ``--name=value`` and ``--name value`` are the same. The next word is no value if it begins with two dashes or is a
  short name of the verb; ``--name=--value`` makes it one.
- A switch takes no value. Of an option that is given twice the last one counts, unless it may be repeated.
- ``-h`` and ``--help`` show the help, whatever else is wrong.
- After ``--`` nothing is an option. Neither are ``-`` alone and negative numbers.
- Names are written out: an abbreviation could be a typing error.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lightning_fot.errors import SettingError, close_match

_HELP = ("-h", "--help")
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?")
# What a value must be, by what makes it of its word.
_KINDS: dict[object, str] = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Option:
    """An option of a verb.

    Args:
        name: Without its dashes.
        about: What it does, for the help.
        kind: Makes the value of its word, by raising ``ValueError`` if it cannot; None for a switch.
        default: Value where it is not given. One that may be repeated has a list, empty at first.
        short: Its other name, such as ``-c``.
        many: Whether it may be repeated.
        metavar: What stands for its value in the help.
        choices: The values that there are.
        group: Heading in the help.
        passed: Leave it among :attr:`Given.others` too.
    """

    name: str
    about: str = ""
    kind: Callable[[str], Any] | None = str
    default: Any = None
    short: str = ""
    many: bool = False
    metavar: str = ""
    choices: tuple[str, ...] = ()
    group: str = "options"
    passed: bool = False

    @property
    def attribute(self) -> str:
        """Name of its value among :attr:`Given.options`."""
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Verb:
    """What may stand on a verb's command line.

    Args:
        program: How the user called it, the verb included.
        options: Its own.
        settings: Names of settings that it takes: ``model.`` stands for all that begin so, an empty one for all.
        plain: What words without dashes mean, such as ``RUN_FOLDER``; ``PATH…`` is one or more, ``[QUESTION…]`` any
            number, ``[FILE]`` at most one.
        others: Whether words of another program are let through.
        about: The help's first paragraph, or with its usage line the whole of it.
        plain_about: What each of ``plain`` is, for the help.
        epilog: The help's last paragraph.
    """

    program: str
    options: tuple[Option, ...] = ()
    settings: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    others: bool = False
    about: str = ""
    plain_about: tuple[str, ...] = ()
    epilog: str = ""

    @property
    def usage(self) -> str:
        """The command in one line."""
        parts = [self.program, *self.plain]
        if self.options:
            parts.append("[options]")
        parts += [f"[--{name}KEY=VALUE …]" for name in self.settings if not name or name.endswith(".")]
        return " ".join(parts)

    def help(self) -> str:
        """The help."""
        width = min(100, shutil.get_terminal_size().columns)
        blocks = [f"Usage: {self.usage}", textwrap.fill(self.about, width)]
        rows = [(name.strip("[]…"), about) for name, about in zip(self.plain, self.plain_about, strict=True)]
        blocks.append("\n".join(_row(name, about, width) for name, about in rows))
        for group in dict.fromkeys(option.group for option in self.options):
            lines = [_row(_shown(option), option.about, width) for option in self.options if option.group == group]
            if group == self.options[0].group:
                lines.append(_row("-h, --help", "shows this help", width))
            blocks.append("\n".join([f"{group}:", *lines]))
        blocks.append("\n".join(textwrap.fill(line, width) for line in self.epilog.splitlines()))
        return "\n\n".join(block for block in blocks if block)


@dataclass
class Given:
    """What stands on a command line.

    Attributes:
        options: The verb's own, each with its value or default.
        settings: ``--key=value`` for each setting, in the order given.
        plain: Words without dashes.
        others: Words of another program, as they were.
        help: Whether the help is asked for; the rest is then not read.
    """

    options: SimpleNamespace
    settings: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    help: bool = False


def assignments(settings: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values of what :attr:`Given.settings` holds; the value is None where there is none."""
    for word in settings:
        name, equals, value = word.removeprefix("--").partition("=")
        yield name, value if equals else None


def asks_for_itself(name: str) -> bool:
    """Whether a setting is a question to jsonargparse, which may stand without a value."""
    return name == "print_config" or name.endswith(".help")


def read(words: Sequence[str], verb: Verb) -> Given:
    """Reads a command line.

    Args:
        words: Those after the verb.
        verb: What may stand there.

    Raises:
        SettingError: A word is unknown, too many or missing, or a value is.

    Example:
        >>> given = read(["a.txt", "--k", "3", "--model.dtype=bfloat16"],
        ...              Verb("lightning bench", (Option("k", kind=int),), ("model.",), ("FILE",)))
        >>> given.options.k, given.settings, given.plain
        (3, ['--model.dtype=bfloat16'], ['a.txt'])
    """
    defaults = {option.attribute: [] if option.many else option.default for option in verb.options}
    given = Given(SimpleNamespace(**defaults))
    end = words.index("--") if "--" in words else len(words)
    if any(word in _HELP for word in words[:end]):
        given.help = True
        return given
    known = {f"--{option.name}": option for option in verb.options}
    known |= {option.short: option for option in verb.options if option.short}
    pending = deque(words[:end])
    while pending:
        _take(pending, known, verb, given)
    rest = words[end:] if verb.others else words[end + 1 :]
    (given.others if verb.others else given.plain).extend(rest)
    if not verb.others:
        _check_plain(given.plain, verb)
    return given


def _take(pending: deque[str], known: dict[str, Option], verb: Verb, given: Given) -> None:
    """Takes one option with its value, or one other word."""
    word = pending.popleft()
    name, equals, text = word.partition("=")
    key = name.removeprefix("--")
    value = text if equals else None

    def next_value() -> str | None:
        follows = pending and not pending[0].startswith("--") and pending[0] not in known
        return pending.popleft() if follows else None

    option = known.get(name)
    if option is not None:
        if option.kind is not None and value is None:
            value = next_value()
        _set(given.options, option, value)
        if option.passed:
            given.others += [name] if value is None else [f"{name}={value}"] if equals else [name, value]
    elif name.startswith("--") and any(key == one or (one[-1:] in ("", ".") and key.startswith(one))
                                       for one in verb.settings):  # fmt: skip
        if not _NAME.fullmatch(key):
            raise SettingError(key, value, "is not a known setting", f"See {verb.program} --help")
        if value is None and key != "print_config":
            value = next_value()
        if value is None and not asks_for_itself(key):
            raise SettingError(key, None, "has no value", f"Write --{key}=VALUE")
        given.settings.append(f"--{key}" if value is None else f"--{key}={value}")
    elif verb.others:
        given.others.append(word)
    elif re.match(r"-[^\d.]", word):
        names = [*known, *(f"--{name}" for name in verb.settings if name and not name.endswith("."))]
        problem = f"is not an option of {verb.program.rpartition(' ')[2]}"
        raise SettingError(name, value, problem, f"{close_match(name, names)}See {verb.program} --help")
    else:
        given.plain.append(word)


def _set(options: SimpleNamespace, option: Option, text: str | None) -> None:
    """Puts an option's value in its place."""
    if option.kind is None:
        if text is not None:
            raise SettingError(option.name, text, "takes no value", f"Write --{option.name} alone.")
        setattr(options, option.attribute, True)
        return
    if not text:
        raise SettingError(option.name, text, "has no value", f"Write --{option.name}={_stand_in(option)}")
    try:
        value = option.kind(text)
    except ValueError:
        raise SettingError(option.name, text, f"must be {_KINDS.get(option.kind, 'another')}", "Correct it.") from None
    if option.choices and value not in option.choices:
        raise SettingError(option.name, text, "is not known", f"Choose {' or '.join(option.choices)}.")
    if option.many:
        getattr(options, option.attribute).append(value)
    else:
        setattr(options, option.attribute, value)


def _check_plain(plain: Sequence[str], verb: Verb) -> None:
    """Refuses too few and too many words without dashes."""
    needed = [name for name in verb.plain if not name.startswith("[")]
    if len(plain) < len(needed):
        name = needed[len(plain)].strip("…")
        raise SettingError(name, None, "is missing", f"Write: {verb.usage}")
    if len(plain) > len(verb.plain) and not any("…" in name for name in verb.plain):
        fix = "Write settings as --key.sub=value." if verb.settings else f"Write: {verb.usage}"
        raise SettingError("arguments", plain[len(verb.plain)], "is not understood", fix)


def _stand_in(option: Option) -> str:
    return option.metavar or ("|".join(option.choices) if option.choices else "VALUE")


def _shown(option: Option) -> str:
    names = f"{option.short}, --{option.name}" if option.short else f"--{option.name}"
    return names if option.kind is None else f"{names} {_stand_in(option)}"


def _row(name: str, about: str, width: int) -> str:
    indent = " " * 26
    filled = textwrap.fill(about, width, initial_indent=indent, subsequent_indent=indent)
    # A long name has a line of its own.
    return f"  {name:24}{filled[26:]}" if len(name) < 23 else f"  {name}\n{filled}"
