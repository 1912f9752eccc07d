"""Errors that users can act on: each names the setting, its value and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable


class SettingError(ValueError):
    """A setting, argument or input that cannot work.

    The command line prints the message without a traceback and exits with code 2.

    Args:
        setting: Name as the user would write it, such as ``model.memory.window``.
        value: What was given.
        problem: What is wrong with it, a clause without a full stop.
        fix: What to do instead, a sentence.

    Example:
        >>> print(SettingError("model.memory.top_k", 0, "must be at least 1", "Try 32."))
        model.memory.top_k=0: must be at least 1. Try 32.
    """

    def __init__(self, setting: str, value: object, problem: str, fix: str) -> None:
        super().__init__(f"{setting}={value!r}: {problem}. {fix}")
        self.setting = setting
        self.value = value
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds from the message alone, which breaks errors that cross a process (DDP, loader workers).
        return (type(self), (self.setting, self.value, self.problem, self.fix))


def check_choice(setting: str, value: object, choices: Collection[object]) -> None:
    """Refuses what is none of some words.

    Args:
        setting: Name, such as ``model.dtype``.
        value: What was given.
        choices: What may be given.

    Raises:
        SettingError: It is something else.
    """
    if value not in choices:
        near = close_match(str(value), map(str, choices))
        raise SettingError(setting, value, "is not known", f"{near}Choose one of {', '.join(map(str, choices))}.")


def check_at_least(prefix: str, owner: object, minimum: int, *names: str) -> None:
    """Refuses settings that are neither None nor a whole number of at least ``minimum``.

    Args:
        prefix: Section, such as ``model.memory``.
        owner: What has the settings as attributes.
        minimum: The least that is allowed.
        names: Of the settings.

    Raises:
        SettingError: One is something else.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise SettingError(
                f"{prefix}.{name}", value, f"must be a whole number of at least {minimum}", "Correct it."
            )


def check_factor(setting: str, value: object) -> None:
    """Refuses what is no factor on scores.

    Args:
        setting: Name, such as ``model.memory.score_factor``.
        value: What was given.

    Raises:
        SettingError: It is no finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SettingError(setting, value, "must be a number above 0", "1 changes nothing.")


class MissingLibraryError(ImportError):
    """An optional library that is needed but cannot be imported.

    Args:
        library: Import name, such as ``scann``.
        install: The command that installs it.
        needed_for: What asked for it, such as ``model.memory.retriever=scann``.
        reason: Why the import failed, when it is more than absence.
    """

    def __init__(self, library: str, install: str, needed_for: str, reason: str | None = None) -> None:
        detail = f" ({reason})" if reason else ""
        super().__init__(
            f"{needed_for} needs the library {library!r}, which cannot be imported{detail}. Run: {install}"
        )
        self.library = library
        self.install = install
        self.needed_for = needed_for
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.library, self.install, self.needed_for, self.reason))


def close_match(word: str, choices: Iterable[str]) -> str:
    """``Did you mean X? `` or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}? " if near else ""
