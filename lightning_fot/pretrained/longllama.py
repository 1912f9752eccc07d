"""What LongLLaMA's checkpoints, and the folders that this package saves, say of their memory. Imports no torch.

LongLLaMA (FoT paper section 4; ``syzymon/long_llama_3b``, ``3b_v1_1``, ``code_7b``) keeps Llama's weights under Llama's
names and writes what it adds into ``config.json``. Its own model code, named there under ``auto_map``, is never run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fot.config.attending.renamed import current
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.retriever import check_named
from lightning_fot.errors import SettingError
from lightning_fot.system.digests import read_sealed

SETTINGS_FILE = "lightning_fot.json"
GATES_FILE = "lightning_fot_gates.safetensors"
FORMAT = 1
# What LongLLaMA adds to Llama's config.json. The last three say how its code computes, not what.
MEMORY_KEYS = ("mem_layers", "mem_positionals", "mem_dtype", "last_context_length")
_OTHER_KEYS = ("mem_attention_grouping", "torch_attention", "gradient_checkpoint_every_ith")
# Where its config.json leaves something out, LongLLaMA takes these; its other defaults are Llama's.
_DEFAULT_WINDOW = 2048
_DEFAULT_LAYERS = 32
_DEFAULT_LAST_CONTEXT = 1024
# Its code stores what torch can name; the store has no float16, and float32 holds every float16 exactly.
_STORED_AS = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}


def is_longllama(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes a LongLLaMA, which is loaded as the Llama that its weights are."""
    names = config.get("architectures") or []
    return config.get("model_type") == "longllama" or any(str(name).startswith("LongLlama") for name in names)


def llama_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A LongLLaMA's ``config.json`` without what Llama does not have, and without the way to its remote code."""
    left_out = {*MEMORY_KEYS, *_OTHER_KEYS, "auto_map", "model_type", "architectures"}
    return {key: value for key, value in config.items() if key not in left_out}


def longllama_keys(config: MemoryConfig, layers: tuple[int, ...], weights_dtype: str) -> dict[str, Any]:
    """Settings under LongLLaMA's names, for the ``config.json`` of a saved model.

    Args:
        config: The settings.
        layers: Memory layers, counted from 0.
        weights_dtype: Name of the model's dtype; what is stored otherwise (``int8``) has no name there.
    """
    stored = config.dtype if config.dtype in _STORED_AS else weights_dtype
    last_context = config.window if config.last_context_length is None else config.last_context_length
    return {
        "mem_layers": list(layers),
        "mem_positionals": config.positions != "none",
        "mem_dtype": stored,
        "last_context_length": last_context,
    }


def memory_settings(folder_or_config: str | os.PathLike[str] | Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """The arguments of ``MemoryConfig`` that a model folder implies.

    A folder saved by this package has all of them, in ``lightning_fot.json``. A LongLLaMA's ``config.json`` has
    ``memory_layers`` (``mem_layers``), ``window`` (``max_position_embeddings``), ``positions`` (``first`` where
    ``mem_positionals``), ``dtype`` (``mem_dtype``) and ``last_context_length``. It has no ``top_k``: the released code
    attends to the whole memory. Here the default ``top_k`` applies, as in the paper's section 3.1; one that is at least
    the memory's length reads it densely, at the price of a dense read.

    Args:
        folder_or_config: A folder, or the content of a ``config.json``.
        **given: Settings of the caller. They win, and what they replace is not checked.

    Returns:
        ``given``, with what the model adds; ``given`` alone for a model that says nothing of a memory.

    Raises:
        SettingError: A setting cannot be understood, or is out of its range; it is named.

    Example:
        >>> memory_settings({"model_type": "longllama", "mem_layers": [6, 12, 18], "num_hidden_layers": 26}, top_k=64)
        ... # doctest: +NORMALIZE_WHITESPACE
        {'top_k': 64, 'memory_layers': [6, 12, 18], 'window': 2048, 'positions': 'first', 'dtype': 'bfloat16',
         'last_context_length': 1024}
    """
    if isinstance(folder_or_config, Mapping):
        config = folder_or_config
    else:
        folder = Path(folder_or_config).expanduser()
        if (folder / SETTINGS_FILE).is_file():
            return read_settings_file(folder / SETTINGS_FILE, **given)
        config = read_config(folder)
    # `mem_layers` alone may be another project's word.
    if not is_longllama(config) and not {"mem_layers", "mem_positionals"} <= set(config):
        return given
    found = dict(given)
    readers = {"memory_layers": _layers, "window": _window, "positions": _positions, "dtype": _dtype}
    for name, read in readers.items():
        if name not in given:
            found[name] = read(config)
    if "last_context_length" not in given:
        found["last_context_length"] = _last_context(config, found["window"], "window" in given)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        SettingError: There is none, or it is not JSON.
    """
    return _read_json(folder / "config.json", "model.backbone", "Give the folder that save_pretrained wrote.")


def read_settings_file(file: Path, **given: Any) -> dict[str, Any]:
    """As :func:`memory_settings`, of a ``lightning_fot.json`` or of the settings of delta weights.

    Raises:
        SettingError: It is damaged, written by a version that knows more, or names a class as its retriever.
    """
    content = _read_json(file, file.name, "Save the model again.")
    known = {field.name for field in dataclasses.fields(MemoryConfig)}
    memory = content.get("memory")
    if content.get("format") != FORMAT or not isinstance(memory, dict):
        raise SettingError(file.name, content.get("format"), f"is not format {FORMAT}", "Save the model again.")
    memory, given = current(memory), current(given)
    if set(memory) - known:
        unknown = ", ".join(sorted(set(memory) - known))
        raise SettingError(file.name, str(file), f"has settings unknown here: {unknown}", "Update lightning-fot.")
    if "retriever" not in given:
        check_named(memory.get("retriever", "exact"), str(file))
    found: dict[str, Any] = {**memory, **given}
    last_context, window = found.get("last_context_length"), found.get("window")
    if "last_context_length" not in given and isinstance(last_context, int) and isinstance(window, int):
        # It was a part of the window that it was saved with.
        found["last_context_length"] = min(last_context, window)
    return found


def _read_json(file: Path, setting: str, fix: str) -> dict[str, Any]:
    try:
        return read_sealed(file)
    except FileNotFoundError:
        raise SettingError(setting, str(file.parent), f"the folder has no {file.name}", fix) from None
    except (OSError, ValueError) as error:
        raise SettingError(setting, str(file.parent), f"{file.name} cannot be read ({error})", fix) from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _layers(config: Mapping[str, Any]) -> list[int]:
    layers, number = config.get("mem_layers"), config.get("num_hidden_layers")
    number = number if _is_count(number) else _DEFAULT_LAYERS
    fix = "Set memory_layers yourself; LongLLaMA's are 6, 12, 18 (3B) and 8, 16, 24 (Code 7B)."
    if not layers:
        raise SettingError("mem_layers", layers, "names no layer: the checkpoint is without memory", fix)
    if not isinstance(layers, (list, tuple)) or any(isinstance(x, bool) or not isinstance(x, int) for x in layers):
        raise SettingError("mem_layers", layers, "must be a list of layer numbers", fix)
    wrong = [layer for layer in layers if not 0 <= layer < number]
    if wrong:
        raise SettingError("mem_layers", layers, f"layer {wrong[0]} is not in a backbone of {number} layers", fix)
    return sorted(set(layers))


def _window(config: Mapping[str, Any]) -> int:
    window = config.get("max_position_embeddings", _DEFAULT_WINDOW)
    if not _is_count(window):
        raise SettingError("max_position_embeddings", window, "must be a number of tokens", "Set window yourself.")
    return int(window)


def _positions(config: Mapping[str, Any]) -> str:
    positionals = config.get("mem_positionals", True)
    if not isinstance(positionals, bool):
        raise SettingError("mem_positionals", positionals, "must be true or false", "Set positions yourself.")
    return "first" if positionals else "none"


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("mem_dtype", "bfloat16")
    if dtype not in _STORED_AS:
        raise SettingError("mem_dtype", dtype, "is not known", f"Set dtype yourself; known: {', '.join(_STORED_AS)}.")
    return _STORED_AS[dtype]


def _last_context(config: Mapping[str, Any], window: Any, fit: bool) -> int:
    last_context = config.get("last_context_length")
    if last_context is None:
        last_context, fit = _DEFAULT_LAST_CONTEXT, True
    if not _is_count(last_context):
        raise SettingError(
            "last_context_length", last_context, "must be a number of tokens", "Set last_context_length yourself."
        )
    if fit:
        # It was a part of the checkpoint's window. A wrong window is refused by MemoryConfig.
        return min(int(last_context), window) if _is_count(window) else int(last_context)
    if last_context > window:
        raise SettingError(
            "last_context_length",
            last_context,
            f"is more than the window, max_position_embeddings={window}",
            "Set last_context_length yourself.",
        )
    return int(last_context)
