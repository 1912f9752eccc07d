"""Opening a model with the memory that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_fot.config import MemoryConfig
from lightning_fot.delta import find_delta
from lightning_fot.errors import SettingError
from lightning_fot.longllama import GATES_FILE, SETTINGS_FILE, is_longllama, memory_settings, read_settings_file
from lightning_fot.pretrained import backbone_config, check_backbone, load_backbone, pretrained_file

if TYPE_CHECKING:
    from lightning_fot.lm import MemoryLM


def pretrained_settings(name: str, **given: Any) -> dict[str, Any]:
    """The arguments of ``MemoryConfig`` that a backbone implies, by any of the names that backbones have.

    See :func:`lightning_fot.longllama.memory_settings`. Imports no torch; of a hub repository only settings are read.

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


def attach_pretrained(name: str, weights_dtype: str = "float32", **settings: Any) -> MemoryLM:
    """Loads a backbone and attaches the memory that it was trained with.

    Args:
        name: A LongLLaMA (folder or hub id), a folder that ``save_pretrained`` of an attached model wrote, or any other
            backbone (see :func:`check_backbone`), whose settings are the defaults of ``MemoryConfig``.
        weights_dtype: ``float32`` or ``bfloat16``.
        **settings: Fields of ``MemoryConfig`` in place of the checkpoint's. A LongLLaMA says nothing of ``top_k`` and
            ``retriever``; see :func:`lightning_fot.longllama.memory_settings`.

    Raises:
        SettingError: The backbone or a setting cannot work.

    Example:
        >>> from lightning_fot import attach_pretrained
        >>> with attach_pretrained("tiny-random-llama", memory_layers=[1], window=16) as lm:
        ...     lm.config.window
        16
    """
    from lightning_fot.backbone import attach_memory

    config = MemoryConfig(**pretrained_settings(name, **settings))
    info = check_backbone(name, tokenizer=False)
    if info.num_layers is not None:
        config.resolve_layers(info.num_layers)
    lm = attach_memory(load_backbone(name, weights_dtype), config)
    load_gates(lm, name)
    return lm


def load_gates(lm: MemoryLM, name: str) -> None:
    """Gives an attached model the gates that were saved with its backbone, for the memory layers that both have.

    Args:
        lm: The attached model; without gates nothing is done.
        name: What its backbone was loaded from.

    Raises:
        SettingError: They are damaged, or do not fit.
    """
    if not len(lm.gates):
        return
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if pretrained_settings(name).get("integration") != "gate":
        return
    file = pretrained_file(name, GATES_FILE)
    try:
        saved = load_file(file) if file is not None else {}
        with torch.no_grad():
            for layer, gate in lm.gates.items():
                if layer in saved:
                    gate.copy_(saved[layer])
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _damaged_gates(name, str(error)) from error
    if not saved:
        raise _damaged_gates(name, "missing")


def _damaged_gates(name: str, reason: str) -> SettingError:
    return SettingError("model.backbone", name, f"{GATES_FILE} cannot be used ({reason})", "Save the model again.")
