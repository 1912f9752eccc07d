"""Settings of the window before, seen by every layer (Transformer-XL, arXiv 1901.02860)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_fot.config.attending.base import SETTING, Attending, MemorySettings, check_alone
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig


@dataclass
class Settings(Attending):
    """A pack is one text, in which every layer sees ``model.memory.overlap`` tokens of the window before.

    ``model.crossbatch.differentiable`` says whether gradients reach them; the paper's models have it false.
    """

    name: ClassVar[str] = "previous_window"
    reading: ClassVar[str | None] = "previous window"

    def check(self, memory: MemorySettings) -> None:
        """Refuses what would make the windows of training others than those of the reading.

        Raises:
            SettingError: Layers would not all see the window before, or windows would not fit each other.
        """
        if memory.memory_layers or not memory.overlap or memory.sink_tokens:
            raise SettingError(
                SETTING,
                self.name,
                "is for local windows that share tokens, without a memory and without sinks; here "
                f"memory_layers={memory.memory_layers}, overlap={memory.overlap}, sink_tokens={memory.sink_tokens}",
                "Set model.memory.memory_layers=[], sink_tokens=0 and overlap to half of window.",
            )
        if memory.window % (memory.window - memory.overlap):
            raise SettingError(
                "model.memory.overlap",
                memory.overlap,
                f"moves windows by {memory.window - memory.overlap} tokens, which do not divide "
                f"window={memory.window}: rows of training would be cut elsewhere than what is read",
                f"Half of window is usual: {memory.window // 2}.",
            )

    def check_training(self, memory: MemorySettings, crossbatch: CrossbatchConfig) -> None:
        """Refuses what is about windows shown to other rows.

        Raises:
            SettingError: One such setting is given.
        """
        check_alone(SETTING, self.name, crossbatch)
        if crossbatch.layout == "paper":
            raise SettingError(
                "model.crossbatch.layout",
                crossbatch.layout,
                f"is not for {SETTING}={self.name}, where a pack is one text",
                "Set it to packed.",
            )

    @classmethod
    def check_reading(cls, readings: Sequence[str], memory: MemorySettings) -> None:
        """Any model of local windows that share tokens reads so, however it was trained.

        Raises:
            SettingError: Windows share none, or there is a memory.
        """
        if memory.memory_layers or not memory.overlap:
            given = f"memory_layers={memory.memory_layers}, overlap={memory.overlap}"
            raise SettingError(
                "evaluation.readings",
                list(readings),
                f"{cls.name} is for local windows that share tokens, without a memory; here {given}",
                "Set model.memory.memory_layers=[] and overlap to half of window, or leave it out.",
            )
