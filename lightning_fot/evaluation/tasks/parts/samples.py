"""Base of tasks that draw several texts of each length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from lightning_fot.config.tasks import SampledTask
from lightning_fot.evaluation.tasks.parts.episode import Episode
from lightning_fot.evaluation.tasks.parts.text import Pieces

SettingsT = TypeVar("SettingsT", bound=SampledTask)


class Samples(ABC, Generic[SettingsT]):
    """``samples`` texts of each length. All are made once at the start, so that what cannot be made is told then.

    Args:
        settings: What they are like.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        SettingError: A length is too short.
    """

    def __init__(self, settings: SettingsT, tokenizer: Any) -> None:
        self._settings = settings
        self._pieces = Pieces(tokenizer)
        for length in settings.lengths:
            self.episodes(length)

    def episodes(self, length: int) -> list[Episode]:
        """All of one length."""
        return [self._episode(length, sample) for sample in range(self._settings.samples)]

    @abstractmethod
    def _episode(self, length: int, sample: int) -> Episode:
        """One of them, drawn by the seed and its number."""
