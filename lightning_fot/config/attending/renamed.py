"""Settings that ``model.memory.attending`` has replaced: they keep working, and say so.

``integration``, ``max_distance``, ``segments`` and ``dilations`` of ``model.memory``, and ``previous_window`` as a
``model.crossbatch.layout``. Also how settings were written before, by which results of older versions are found.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from lightning_fot.config.attending.base import SETTING
from lightning_fot.config.attending.registry import normal
from lightning_fot.errors import SettingError

# By way: the settings that it had, and the values that left it out.
_OLD: dict[str, dict[str, Any]] = {
    "dilated": {"segments": [], "dilations": []},
    "rectified": {"max_distance": None},
    "gate": {"integration": "softmax"},
}
# Arguments of ``MemoryConfig`` that are not kept, in their order there.
OLD_KEYS = ("integration", "max_distance", "segments", "dilations")
_LAYOUT = "previous_window"
# Tasks of an evaluation that version 0.1 did not have.
_LATER_TASKS = ("lookup",)


def in_new_words(attending: str | dict[str, Any] | None, old: Mapping[str, Any]) -> dict[str, Any] | None:
    """``attending`` with what old settings say in its place.

    Args:
        attending: As given.
        old: Values by old key; None for what is not given. They win over arguments of the same way, as they did where
            a command line names them beside a file.

    Raises:
        SettingError: Two ways are named.
    """
    spec = normal(attending)
    for way, unset in _OLD.items():
        given = {key: old[key] for key in unset if old.get(key) is not None}
        if not given:
            continue
        key, value = next(iter(given.items()))
        if all(given[key] == unset[key] for key in given):
            spec = None if spec is not None and spec["name"] == way else spec
            continue
        if way == "gate" and value != "gate":
            raise SettingError(f"model.memory.{key}", value, "is not known", "Choose one of softmax, gate.")
        if spec is not None and spec["name"] != way:
            raise SettingError(
                f"model.memory.{key}",
                value,
                f"is another way of attending than {SETTING}={spec}",
                "Choose one of them.",
            )
        spec = {**(spec or {}), "name": way, **({} if way == "gate" else given)}
    return spec


def current(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a memory as they were written, with ``attending`` in place of what it has replaced.

    Example:
        >>> current({"window": 16, "integration": "gate"})
        {'window': 16, 'attending': {'name': 'gate'}}
    """
    kept = {key: value for key, value in memory.items() if key not in OLD_KEYS}
    if len(kept) < len(memory):
        kept["attending"] = in_new_words(memory.get("attending"), {key: memory.get(key) for key in OLD_KEYS})
    return kept


def tasks_as_before(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation as version 0.1 wrote them, where no task is asked for that it did not have.

    Example:
        >>> tasks_as_before({"passkey_tokens": None, "lookup": None})
        {'passkey_tokens': None}
    """
    return {name: value for name, value in evaluation.items() if name not in _LATER_TASKS or value}


def as_before(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a memory as they were written before ``attending``, where they could be: what is kept by a digest of
    its settings is then found again.

    Example:
        >>> as_before({"window": 16, "attending": None})["integration"]
        'softmax'
    """
    spec = normal(memory.get("attending"))
    unset = {key: value for keys in _OLD.values() for key, value in keys.items()}
    kept = {key: value for key, value in memory.items() if key not in (*OLD_KEYS, "attending")} | unset
    if spec is None:
        return kept
    if spec["name"] == "gate":
        return kept | {"integration": "gate"}
    if spec["name"] in _OLD:
        return kept | {key: value for key, value in spec.items() if key != "name"}
    return kept | {"attending": spec}


def told(old: Mapping[str, Any], spec: Mapping[str, Any] | None) -> str | None:
    """What to say of old settings; None where they say nothing."""
    unset = {key: value for keys in _OLD.values() for key, value in keys.items()}
    given = {key: old[key] for key in OLD_KEYS if old.get(key) is not None and old[key] != unset[key]}
    if not given:
        return None
    listed = ", ".join(f"model.memory.{key}={_word(value)}" for key, value in given.items())
    return f"{listed}: now written {SETTING}={_word(spec)}."


def modernise(settings: Mapping[str, Any]) -> list[str]:
    """Changes old settings of a configuration to what has replaced them.

    Args:
        settings: All sections; ``model`` is changed in place.

    Returns:
        What to say on screen.
    """
    model = settings.get("model")
    if not isinstance(model, dict):
        return []
    notes: list[str] = []
    memory, crossbatch = model.get("memory"), model.get("crossbatch")
    if isinstance(memory, Mapping):
        model["memory"] = current(memory)
        note = told(memory, model["memory"].get("attending"))
        notes += [] if note is None else [note]
    kept = model.get("memory") or {}
    if isinstance(crossbatch, Mapping) and crossbatch.get("layout") == _LAYOUT and isinstance(kept, Mapping):
        # Beside another way it stays, and is refused by its own name.
        if kept.get("attending") is None:
            model["memory"] = {**kept, "attending": {"name": _LAYOUT}}
            model["crossbatch"] = {**crossbatch, "layout": "packed"}
        notes.append(_layout_note())
    return notes


def way_of_layout(attending: str | dict[str, Any] | None, layout: str) -> dict[str, Any] | None:
    """``attending`` of a model that is trained in a layout.

    Raises:
        SettingError: The layout is an old name of one way, and ``attending`` names another.
    """
    spec = normal(attending)
    if layout != _LAYOUT or (spec is not None and spec["name"] == _LAYOUT):
        return spec
    if spec is not None:
        raise SettingError(
            "model.crossbatch.layout",
            layout,
            f"is another way of attending than {SETTING}={spec}",
            "Choose one of them: packed is the layout of all others.",
        )
    warnings.warn(_layout_note(), DeprecationWarning, stacklevel=6)
    return {"name": _LAYOUT}


def _layout_note() -> str:
    return f"model.crossbatch.layout={_LAYOUT}: now written {SETTING}.name={_LAYOUT}, with layout=packed."


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
