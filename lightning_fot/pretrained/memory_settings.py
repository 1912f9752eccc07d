"""Opening a model with the memory that it was trained with."""

from __future__ import annotations

from typing import Any

from lightning_fot.pretrained.backbones import backbone_config, check_backbone, pretrained_file
from lightning_fot.pretrained.delta import find_delta
from lightning_fot.pretrained.longllama import (
    SETTINGS_FILE,
    is_longllama,
    memory_settings,
    read_settings_file,
)


def pretrained_settings(name: str, **given: Any) -> dict[str, Any]:
    """The arguments of ``MemoryConfig`` that a backbone implies, by any of the names that backbones have.

    See ``longllama.memory_settings``. Imports no torch; of a hub repository only settings are read.

    Args:
        name: As for :func:`check_backbone`.
        **given: Settings of the caller, which win.

    Raises:
        SettingError: The backbone cannot be found, or a setting of it is out of its range.
    """
    check_backbone(name, tokenizer=False)
    delta = find_delta(name)
    if delta is not None:
        return read_settings_file(delta.settings, **given)
    config = backbone_config(name)
    # Asking the hub for a file costs a request: only where there is one.
    if "mem_layers" in config and not is_longllama(config):
        file = pretrained_file(name, SETTINGS_FILE)
        if file is not None:
            return read_settings_file(file, **given)
    return memory_settings(config, **given)
