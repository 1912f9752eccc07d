"""Settings of dilated attention in the memory layers (LongNet, arXiv 2307.02486)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from lightning_fot.config.attending.base import SETTING, Attending, MemorySettings, check_alone
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig


@dataclass
class Settings(Attending):
    """Memory layers have dilated attention over the whole text in place of a memory.

    Args:
        segments: Lengths of the segments in which they attend.
        dilations: For each of ``segments``, every how many-th token of a segment a head sees; one of them is 1.

    Raises:
        SettingError: They are no patterns.
    """

    name: ClassVar[str] = "dilated"
    reading: ClassVar[str | None] = "dilated attention"
    keeps_memory: ClassVar[bool] = False
    segments: list[int] = field(default_factory=list)
    dilations: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key, values in (("segments", self.segments), ("dilations", self.dilations)):
            if not isinstance(values, list) or any(
                isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values
            ):
                raise SettingError(f"{SETTING}.{key}", values, "must hold whole numbers of at least 1", "Correct it.")
        if not self.segments or len(self.segments) != len(self.dilations):
            raise SettingError(
                f"{SETTING}.segments",
                self.segments,
                f"has not one each of dilations={self.dilations}",
                "Give as many dilations as segments, for example segments=[256,1024], dilations=[1,4].",
            )
        if any(step > size for size, step in self.patterns):
            raise SettingError(
                f"{SETTING}.dilations",
                self.dilations,
                f"leave segments of {self.segments} without a token for some heads",
                "Keep each at most its segment's length.",
            )
        if 1 not in self.dilations:
            raise SettingError(
                f"{SETTING}.dilations",
                self.dilations,
                "would leave tokens without any pattern",
                "Give the shortest segment a dilation of 1.",
            )

    @property
    def patterns(self) -> list[tuple[int, int]]:
        """Segment lengths and dilations, in pairs."""
        return list(zip(self.segments, self.dilations, strict=True))

    def check(self, memory: MemorySettings) -> None:
        """Refuses models without memory layers, positions of a memory, and local windows that share tokens.

        Raises:
            SettingError: One of them.
        """
        if not memory.memory_layers:
            raise SettingError(
                f"{SETTING}.segments",
                self.segments,
                "are for memory layers, and there are none",
                "Name memory_layers.",
            )
        if memory.positions == "constant":
            raise SettingError(
                "model.memory.positions",
                memory.positions,
                f"cannot be had beside dilated attention (segments={self.segments}), which has no memory",
                "Set it to first.",
            )
        for key, given in (("overlap", memory.overlap), ("sink_tokens", memory.sink_tokens)):
            if given:
                raise SettingError(
                    f"model.memory.{key}",
                    given,
                    f"cannot be had beside dilated attention (segments={self.segments})",
                    "Set it to 0.",
                )

    def check_training(self, memory: MemorySettings, crossbatch: CrossbatchConfig) -> None:
        """Refuses what is about windows shown to other rows: a pack is one text here.

        Raises:
            SettingError: One such setting is given.
        """
        check_alone(SETTING, self.name, crossbatch)
        for name, given, needed in (
            ("layout", crossbatch.layout, "packed"),
            ("differentiable", crossbatch.differentiable, True),
        ):
            if given != needed:
                raise SettingError(
                    f"model.crossbatch.{name}",
                    given,
                    f"is not for dilated attention (segments={self.segments}), where a pack is one text and "
                    "all of it gets gradients",
                    f"Set it to {needed}.",
                )

    def plain_tokens(self, window: int) -> int:
        """None: patterns are not the backbone's attention."""
        return 0
