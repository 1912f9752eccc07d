"""Backbones with random weights, described by a file: what experiments start from that train a model from nothing.

``model.json`` holds what transformers' configuration of a model takes, with its ``model_type``; ``model.json@3`` draws
the weights with seed 3 in place of 0. Text is read as bytes (ByT5's tokenizer), so that no file of words is needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.system.package import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = re.compile(r"(?P<file>.+\.json)(@(?P<seed>\d+))?")
_SHIPPED = shipped()
# Ids of the byte tokenizer: 3 special tokens, 256 bytes, 125 sentinels.
BYTE_IDS = 384
_EXAMPLE = '{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, …}'


@dataclass(frozen=True)
class Architecture:
    """A configuration of transformers, and the seed of the weights.

    Args:
        settings: The file's, ``model_type`` among them.
        seed: Of the draw of the weights.
    """

    settings: dict[str, Any]
    seed: int


def is_architecture(name: str) -> bool:
    """Whether a backbone's name is that of a configuration file."""
    return _NAME.fullmatch(name) is not None


def read_architecture(name: str) -> Architecture:
    """Reads ``FILE.json`` or ``FILE.json@SEED``; a file of the package goes by the name that it has there.

    Raises:
        SettingError: There is no such file, or it is no configuration of a model.
    """
    match = _NAME.fullmatch(name)
    assert match is not None  # callers ask is_architecture first
    path = Path(match["file"]).expanduser()
    if not path.is_file():
        path = _SHIPPED / match["file"].removeprefix("./")
    if not path.is_file():
        raise SettingError("model.backbone", name, "no such file", f"Write a configuration: {_EXAMPLE}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise SettingError("model.backbone", name, f"is no JSON ({error})", f"Write {_EXAMPLE}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise SettingError("model.backbone", name, "has no model_type", f"Write {_EXAMPLE}")
    if settings.get("vocab_size", 0) < BYTE_IDS:
        raise SettingError(
            "model.backbone",
            name,
            f"vocab_size={settings.get('vocab_size')} is too few: text is read as bytes, with {BYTE_IDS} ids",
            f"Write vocab_size: {BYTE_IDS}.",
        )
    return Architecture(settings, int(match["seed"] or 0))


def build(name: str) -> PreTrainedModel:
    """The model in fp32 with its random weights; torch's own random numbers are left as they were.

    Raises:
        SettingError: transformers does not know the model, or refuses a setting.
    """
    import torch
    import transformers

    found = read_architecture(name)
    settings = {**found.settings, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    kind = settings.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(found.seed)
            auto: Any = transformers.AutoModelForCausalLM
            model: PreTrainedModel = auto.from_config(config)
    except (ValueError, TypeError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingError(
            "model.backbone", name, f"makes no model ({first_line})", "Correct the configuration."
        ) from error
    return model
