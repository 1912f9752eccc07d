"""Arguments of the harness's model ``lightning-fot``, read as a command line of ours, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError, close_match
from lightning_fot.request.model import settings_of
from lightning_fot.request.request import read_request

if TYPE_CHECKING:
    from lightning_fot.request.model import ModelSettings

MODEL_NAME = "lightning-fot"
_NAMES = ("config", "ckpt_path", "model.backbone", "model.dtype", "model.memory")


def model_settings(arguments: Mapping[str, Any]) -> ModelSettings:
    """The model that arguments such as ``{"config": "hnsw", "model.memory.top_k": 64}`` describe, checked.

    Raises:
        SettingError: One is unknown, or a value cannot work.
        MissingLibraryError: A library that they need is not installed.
    """
    words: list[str] = []
    for name, value in arguments.items():
        if name not in _NAMES and not name.startswith("model.memory."):
            raise SettingError(name, value, "is not known", f"{close_match(name, _NAMES)}Use {', '.join(_NAMES)}.*.")
        words.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return settings_of(read_request("lm-eval", words))


def batch_count(value: int | str) -> int:
    """The harness's ``batch_size``.

    Raises:
        SettingError: It is no number. ``auto`` tries batches of the longest prompt until memory runs out: prompts have
            no longest length here, and the memory of each grows with it.

    Example:
        >>> batch_count("4")
        4
    """
    text = str(value).strip()
    if text.partition(":")[0] == "auto":
        raise SettingError(
            "batch_size", value, "tries batches until memory runs out, and prompts of any length leave no such batch",
            "Give a number: 8 is good for short requests on a CPU, 1 for long prompts.",
        )  # fmt: skip
    if not text.isdigit() or int(text) < 1:
        raise SettingError("batch_size", value, "must be a whole number of at least 1", "Try 1.")
    return int(text)
