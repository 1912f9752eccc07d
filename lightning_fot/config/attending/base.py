"""What the settings of a way of attending say: which model it needs, what it refuses, how a text is read by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig

SETTING = "model.memory.attending"


class MemorySettings(Protocol):
    """What a way of attending looks at in ``MemoryConfig``."""

    memory_layers: list[int] | Literal["all"]
    positions: Literal["first", "none", "constant"]
    window: int
    overlap: int
    sink_tokens: int
    attending: str | dict[str, Any] | None

    @property
    def way(self) -> Attending:
        """The settings of ``attending``."""


@dataclass
class Attending:
    """Settings of a way of attending; this class itself is FoT's own: one softmax over local and retrieved pairs.

    A subclass has the arguments of its way as fields, and checks them in ``__post_init__``.

    Attributes:
        name: As in ``model.memory.attending``.
        reading: What ``evaluation.readings`` calls it, in words, where it reads a text as a whole; None for the others.
        keeps_memory: False where memory layers attend in place of having a memory.
        goes_on: Whether a text can go on token by token, as in generating.
        learns: Whether it has parameters beside the backbone's.
    """

    name: ClassVar[str] = ""
    reading: ClassVar[str | None] = None
    keeps_memory: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True
    learns: ClassVar[bool] = False

    def check(self, memory: MemorySettings) -> None:
        """Refuses memory settings that the way cannot stand beside.

        Raises:
            SettingError: One of them.
        """

    def check_training(self, memory: MemorySettings, crossbatch: CrossbatchConfig) -> None:
        """Refuses training that the way cannot do.

        Raises:
            SettingError: It cannot.
        """

    def check_readings(self, readings: Sequence[str]) -> None:
        """Refuses readings of an evaluation that a model of this way cannot do.

        Raises:
            SettingError: One needs a memory, and there is none.
        """
        if not self.keeps_memory and (self.name not in readings or "memory" in readings):
            raise SettingError(
                "evaluation.readings",
                list(readings),
                f"with {SETTING}={self.name} memory layers have {self.reading} in place of a memory",
                f"Set readings=[{self.name}], or leave {SETTING} out for a memory.",
            )

    @classmethod
    def check_reading(cls, readings: Sequence[str], memory: MemorySettings) -> None:
        """Refuses a reading of this way for a model that attends otherwise.

        Raises:
            SettingError: It does.
        """
        if memory.way.name != cls.name:
            raise SettingError(
                "evaluation.readings",
                list(readings),
                f"{cls.name} is for models of {SETTING}={cls.name}, here {SETTING}={memory.attending}",
                f"Set {SETTING}.name={cls.name}, or leave the reading out.",
            )

    def plain_tokens(self, window: int) -> int:
        """Tokens up to which a model with an empty memory is its plain backbone; 0 where it never is."""
        return window

    def check_memory(self, what: str) -> None:
        """Refuses what only a model with a memory can do.

        Args:
            what: What was asked for, such as ``ingest``.

        Raises:
            SettingError: Its memory layers attend in place of having a memory.
        """
        if not self.keeps_memory:
            raise SettingError(
                SETTING,
                self.name,
                f"{self.reading} is in place of a memory, and {what} needs one",
                f"Leave {SETTING} out, or read whole texts.",
            )

    def check_goes_on(self, what: str) -> None:
        """Refuses what lets a text go on token by token.

        Args:
            what: What was asked for, such as ``generating``.

        Raises:
            SettingError: The way does not serve it.
        """
        self.check_memory(what)
        if not self.goes_on:
            raise SettingError(SETTING, self.name, f"is not served while {what}", "Leave it out.")


def check_alone(setting: str, value: object, crossbatch: CrossbatchConfig) -> None:
    """Refuses what concerns windows that are shown to other rows, where none are.

    Args:
        setting: What shows none.
        value: Its value.
        crossbatch: What is checked.

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
