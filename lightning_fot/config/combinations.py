"""Settings that are right by themselves and cannot stand together. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig
    from lightning_fot.config.memory import MemoryConfig


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
