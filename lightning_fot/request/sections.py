"""What a configuration holds as the dataclasses of ``config``: their fields say which names and types there are.

jsonargparse tells whether a value fits a type, as it does again when it reads the whole. It needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_fot.errors import SettingError, close_match

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SectionT = TypeVar("SectionT")


def check_names(given: object, kind: type, section: str = "") -> None:
    """Refuses names that a section does not have; sections inside it are looked at too.

    Args:
        given: What the configuration holds there.
        kind: The dataclass of the section.
        section: Its name; empty for the whole.

    Raises:
        SettingError: A name is unknown.
    """
    if not isinstance(given, Mapping):
        return
    types = _types(kind)
    for name, value in given.items():
        if name not in types:
            raise unknown_setting(section, str(name), value, types)
        inner = _section(types[name])
        if inner is not None:
            check_names(_arguments(value, inner), inner, _join(section, name))


def unknown_setting(section: str, name: str, value: object, known: Iterable[str]) -> SettingError:
    """The error for a setting that does not exist."""
    names, key = [_join(section, one) for one in known], _join(section, name)
    return SettingError(
        key, value, "is not a known setting", f"{close_match(key, names)}Known here: {', '.join(names)}."
    )


def build(kind: type[SectionT], given: object, section: str = "") -> SectionT:
    """The dataclass of a section, which checks itself.

    Args:
        kind: The dataclass.
        given: What the configuration holds there, with names that it has; None for nothing.
        section: Name of the section; empty for the whole.

    Raises:
        SettingError: A value is of another type, out of its range, or does not fit the others.
    """
    given = {} if given is None else _arguments(given, kind)
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise SettingError(section, given, "must hold settings, not one value", f"Write {section}: with keys below.")
    types = _types(kind)
    values: dict[str, Any] = {}
    for name, value in given.items():
        inner, key = _section(types[name]), _join(section, name)
        if inner is None:
            values[name] = _value(value, types[name], key)
        elif value is None and NoneType in _options(types[name]):
            values[name] = None
        else:
            values[name] = build(inner, value, key)
    return kind(**values)


def _join(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)


def _types(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _options(annotation: Any) -> tuple[Any, ...]:
    """What a type may be: the parts of a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _section(annotation: Any) -> Any:
    """The dataclass that a type is or may be."""
    return next((one for one in _options(annotation) if dataclasses.is_dataclass(one)), None)


def _arguments(given: object, kind: type) -> object:
    """Settings that jsonargparse has written with the class that they belong to."""
    if isinstance(given, Mapping) and str(given.get("class_path", "")).rpartition(".")[2] == kind.__name__:
        return given.get("init_args") or {}
    return given


@cache
def _parser(annotation: Any) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    return parser


def _value(value: Any, annotation: Any, key: str) -> Any:
    """A value as its type has it.

    Raises:
        SettingError: It does not fit the type.
    """
    if annotation is Any:
        return value
    from jsonargparse import ArgumentError

    try:
        if value is None and NoneType not in _options(annotation):
            # jsonargparse takes it for a value that is not given.
            raise ArgumentError(None, "no value")
        read = _parser(annotation).parse_object({"value": value}).value
        # As it was written, where that is the same: 2, not 2.0.
        return value if read == value else read
    except ArgumentError as error:
        if str in _options(annotation) and isinstance(value, int | float):
            # A folder named 2024: the command line's words are read as YAML here, and as texts by jsonargparse.
            return str(value)
        choices = _choices(annotation)
        if choices:
            near = close_match(str(value), choices)
            raise SettingError(key, value, "is not known", f"{near}Choose one of {', '.join(choices)}.") from error
        wanted = " | ".join(map(_name, _options(annotation)))
        raise SettingError(key, value, f"must be of type {wanted}", "Correct it.") from error


def _name(kind: Any) -> str:
    """A type as it is written."""
    if kind is NoneType:
        return "None"
    return str(kind.__name__ if get_origin(kind) is None else kind).replace("typing.", "")


def _choices(annotation: Any) -> list[str]:
    """The words among which a type, or that of a list's items, lets choose; none where it takes other things too."""
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    options = [one for one in _options(annotation) if one is not NoneType]
    if len(options) > 1 and not all(map(_choices, options)):
        return []
    return [word for part in get_args(annotation) for word in _choices(part)]
