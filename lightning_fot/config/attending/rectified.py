"""Settings of rectified positions (ReRoPE, https://kexue.fm/archives/9708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fot.config.attending.base import SETTING, Attending, MemorySettings
from lightning_fot.errors import SettingError


@dataclass
class Settings(Attending):
    """A window may be longer than the backbone was trained on. For models without memory layers.

    Args:
        max_distance: Local distances from this one on count as it, in every layer.

    Raises:
        SettingError: It is no distance.
    """

    name: ClassVar[str] = "rectified"
    goes_on: ClassVar[bool] = False
    max_distance: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.max_distance, bool) or not isinstance(self.max_distance, int) or self.max_distance < 1:
            raise SettingError(
                f"{SETTING}.max_distance",
                self.max_distance,
                "must be a whole number of at least 1",
                "Half of the length that the backbone was trained on is a good one.",
            )

    def check(self, memory: MemorySettings) -> None:
        """Refuses pairs that have no distance to clamp.

        Raises:
            SettingError: There is a memory, an overlap or a sink.
        """
        if memory.memory_layers or memory.overlap or memory.sink_tokens:
            raise SettingError(
                f"{SETTING}.max_distance",
                self.max_distance,
                "is for windows that are read alone: pairs of a memory, an overlap or sinks have no distance to clamp",
                "Set memory_layers=[], overlap=0 and sink_tokens=0, or leave it out.",
            )

    def plain_tokens(self, window: int) -> int:
        """Farther distances are clamped."""
        return min(window, self.max_distance)
