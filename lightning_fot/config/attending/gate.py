"""Settings of gates (Memorizing Transformers, arXiv 2203.08913)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fot.config.attending.base import Attending


@dataclass
class Settings(Attending):
    """Each head of a memory layer mixes memory and local context by a learned share, in place of one softmax."""

    name: ClassVar[str] = "gate"
    learns: ClassVar[bool] = True

    def plain_tokens(self, window: int) -> int:
        """None: an empty memory has its share too."""
        return 0
