"""Settings that are right by themselves and cannot stand together. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_fot.config.attending.renamed import way_of_layout

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig
    from lightning_fot.config.memory import MemoryConfig


def check_training(memory: MemoryConfig, crossbatch: CrossbatchConfig) -> MemoryConfig:
    """Refuses training that a model could not do, or that would not be what the model then reads.

    Args:
        memory: How the model reads.
        crossbatch: What rows of a batch see of each other.

    Returns:
        ``memory``; where the layout is an old name of a way of attending, with that way.

    Raises:
        SettingError: They cannot stand together.
    """
    attending = way_of_layout(memory.attending, crossbatch.layout)
    if attending != memory.attending:
        memory = replace(memory, attending=attending)
    memory.way.check_training(memory, crossbatch)
    return memory
