"""Settings that are right by themselves and cannot stand together. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config import CrossbatchConfig, MemoryConfig


def check_training(memory: MemoryConfig, crossbatch: CrossbatchConfig) -> None:
    """Refuses training that a model could not do, or that would not be what the model then reads.

    Args:
        memory: How the model reads.
        crossbatch: What rows of a batch see of each other.

    Raises:
        SettingError: They cannot stand together.
    """
    if crossbatch.layout == "previous_window":
        check_segments_of_window(memory)
        _check_alone("model.crossbatch.layout", "previous_window", crossbatch)
    if not memory.segments:
        return
    _check_alone("model.memory.segments", memory.segments, crossbatch)
    for name, given, needed in (
        ("layout", crossbatch.layout, "packed"),
        ("differentiable", crossbatch.differentiable, True),
    ):
        if given != needed:
            raise SettingError(
                f"model.crossbatch.{name}",
                given,
                f"is not for dilated attention (model.memory.segments={memory.segments}), where a pack is one text and "
                "all of it gets gradients",
                f"Set it to {needed}.",
            )


def check_dilated(memory: MemoryConfig) -> None:
    """Refuses patterns of dilated attention that are none, and what cannot be had beside them.

    Raises:
        SettingError: Something cannot work.
    """
    name, patterns = "model.memory.segments", (memory.segments, memory.dilations)
    for key, values in zip(("segments", "dilations"), patterns, strict=True):
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
            raise SettingError(f"model.memory.{key}", values, "must hold whole numbers of at least 1", "Correct it.")
    if len(memory.segments) != len(memory.dilations):
        raise SettingError(name, memory.segments, f"has not one each of dilations={memory.dilations}", "Correct it.")
    if any(step > size for size, step in zip(*patterns, strict=True)):
        raise SettingError(
            "model.memory.dilations",
            memory.dilations,
            f"leave segments of {memory.segments} without a token for some heads",
            "Keep each at most its segment's length.",
        )
    if 1 not in memory.dilations:
        raise SettingError(
            "model.memory.dilations",
            memory.dilations,
            "would leave tokens without any pattern",
            "Give the shortest segment a dilation of 1.",
        )
    if not memory.memory_layers:
        raise SettingError(name, memory.segments, "are for memory layers, and there are none", "Name memory_layers.")
    for key, given, needed in (
        ("overlap", memory.overlap, 0),
        ("sink_tokens", memory.sink_tokens, 0),
        ("integration", memory.integration, "softmax"),
    ):
        if given != needed:
            raise SettingError(
                f"model.memory.{key}",
                given,
                f"cannot be had beside dilated attention (segments={memory.segments})",
                f"Set it to {needed}.",
            )


def check_segments_of_window(memory: MemoryConfig) -> None:
    """Refuses what would make the windows of training others than those of the reading ``previous_window``.

    Raises:
        SettingError: Layers would not all see the window before, or windows would not fit each other.
    """
    if memory.memory_layers or not memory.overlap or memory.sink_tokens:
        raise SettingError(
            "model.crossbatch.layout",
            "previous_window",
            "is for local windows that share tokens, without a memory and without sinks; here "
            f"memory_layers={memory.memory_layers}, overlap={memory.overlap}, sink_tokens={memory.sink_tokens}",
            "Set model.memory.memory_layers=[], sink_tokens=0 and overlap to half of window.",
        )
    if memory.window % (memory.window - memory.overlap):
        raise SettingError(
            "model.memory.overlap",
            memory.overlap,
            f"moves windows by {memory.window - memory.overlap} tokens, which do not divide window={memory.window}: "
            "rows of training would be cut elsewhere than what is read",
            f"Half of window is usual: {memory.window // 2}.",
        )


def _check_alone(setting: str, value: object, crossbatch: CrossbatchConfig) -> None:
    """Refuses what concerns windows that are shown to other rows, where none are.

    Raises:
        SettingError: One of them is set.
    """
    for name, given, unset in (
        ("schedule", crossbatch.schedule, None),
        ("across_ranks", crossbatch.across_ranks, False),
    ):
        if given != unset:
            raise SettingError(
                f"model.crossbatch.{name}",
                "(given)" if given is not True else True,
                f"is about windows shown to other rows, and {setting}={value!r} shows none",
                "Leave it out.",
            )
