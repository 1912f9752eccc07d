"""Ways of attending by name. A way is known by its file in ``model/passes/ways``, without importing it.

Its settings are told before torch loads where they stand in ``config/attending`` under the same name, and otherwise
once the file of the way is imported, which registers them.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from lightning_fot.config.attending.base import SETTING, Attending
from lightning_fot.errors import SettingError, close_match

_REGISTERED: dict[str, type[Attending]] = {}


def register(settings: type[Attending]) -> None:
    """Makes settings known by their name.

    Raises:
        ValueError: Other settings have that name.
    """
    known = _REGISTERED.setdefault(settings.name, settings)
    if known is not settings:
        raise ValueError(f"{settings.name} already is a way of attending, with settings {known}")


@cache
def _shipped() -> tuple[str, ...]:
    folder = files("lightning_fot").joinpath("model", "passes", "ways")
    names = (file.name for file in folder.iterdir() if file.name.endswith(".py"))
    return tuple(sorted(name.removesuffix(".py") for name in names if not name.startswith("_")))


def names() -> list[str]:
    """All names, sorted."""
    return sorted({*_shipped(), *_REGISTERED})


def find(name: str) -> type[Attending] | None:
    """The settings of a way; None where they are not known before its file is imported."""
    if name not in _REGISTERED and name in _shipped():
        module = f"{__package__}.{name}"
        if find_spec(module) is not None:
            register(import_module(module).Settings)
    return _REGISTERED.get(name)


def readings() -> dict[str, str]:
    """Ways that read a text as a whole, in words."""
    known = {name: find(name) for name in names()}
    words = {name: name.replace("_", " ") if way is None else way.reading for name, way in known.items()}
    return {name: word for name, word in words.items() if word is not None}


def normal(spec: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """``{"name": ..., **arguments}``, or None for FoT's own way.

    Raises:
        SettingError: It is something else, or there is no such way.
    """
    if spec is None or spec == {}:
        return None
    given = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise SettingError(
            SETTING, spec, "names no way of attending", f"Write name, and its arguments; known: {', '.join(names())}."
        )
    if given["name"] not in names():
        raise SettingError(
            f"{SETTING}.name",
            given["name"],
            "is not known",
            f"{close_match(given['name'], names())}Known: {', '.join(names())}. Leave it out for FoT's own.",
        )
    return dict(given)


def read(spec: str | dict[str, Any] | None) -> Attending:
    """The settings that ``model.memory.attending`` describes, checked; FoT's own where they are not known yet.

    Raises:
        SettingError: They cannot work.
    """
    given = normal(spec)
    settings = None if given is None else find(given["name"])
    if given is None or settings is None:
        return Attending()
    arguments = {key: value for key, value in given.items() if key != "name"}
    known = [field.name for field in fields(settings)]
    for key, value in arguments.items():
        if key not in known:
            raise SettingError(
                f"{SETTING}.{key}",
                value,
                f"is not a setting of {settings.name}",
                f"{close_match(key, known)}Known: {', '.join(known) or 'none'}.",
            )
    return settings(**arguments)
