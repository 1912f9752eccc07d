"""Which parameters are trained, and how an optimiser groups them; low-rank adapters (LoRA) by peft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.system.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from lightning_fot.config.backbone import LoraSettings

MARK = "lora_"
_ADAPTER_FILE = "adapter_model.safetensors"
# peft writes names as they are inside its own wrapper.
_PEFT_PREFIX = "base_model.model."


def trained_layers(trainable: str, memory_layers: Sequence[int], layers: Iterable[int]) -> list[int]:
    """Numbers of the blocks that ``model.trainable`` means.

    Args:
        trainable: ``memory_layers``, ``memory_attention``, ``from_first_memory_layer`` or ``all``.
        memory_layers: Sorted.
        layers: All.

    Raises:
        SettingError: Memory layers are to be trained and there is none.
    """
    if trainable == "all":
        return list(layers)
    if not memory_layers:
        raise SettingError(
            "model.trainable", trainable, "there is no memory layer to train", "Use all, or name memory layers."
        )
    if trainable == "from_first_memory_layer":
        return [i for i in layers if i >= memory_layers[0]]
    return list(memory_layers)


def attention_names(model: nn.Module, attentions: Iterable[nn.Module]) -> list[str]:
    """Names of these attention layers, such as ``model.layers.10.self_attn``."""
    names = {id(part): name for name, part in model.named_modules()}
    return [names[id(attention)] for attention in attentions]


def block_names(model: nn.Module, attentions: Iterable[nn.Module]) -> list[str]:
    """Names of the blocks that hold these attention layers: ``model.layers.10`` holds ``model.layers.10.self_attn``."""
    return [name.rpartition(".")[0] for name in attention_names(model, attentions)]


def add_lora(model: nn.Module, settings: LoraSettings, layers: Sequence[int]) -> None:
    """Puts low-rank adapters beside linear modules of some blocks (Hu et al., arXiv 2106.09685); all else is frozen.

    A fresh adapter adds nothing: the model computes what it did.

    Args:
        model: A Hugging Face model.
        settings: Rank, scale, dropout, and which modules.
        layers: Numbers of the blocks.

    Raises:
        MissingLibraryError: peft is not installed.
        SettingError: No module of these names is there.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingLibraryError("peft", "pip install 'lightning-fot[lora]'", "model.lora") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=list(settings.modules),
        layers_to_transform=list(layers),
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise SettingError(
            "model.lora.modules", settings.modules, f"are not in this model ({error})", f"Use some of {names}."
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters to the weights beside them and takes them out: a plain model is left."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(name, part) for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, part in found:
        part.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, part.get_base_layer())


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapters as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    ``PeftModel.from_pretrained(backbone, folder)`` opens them beside a plain backbone.

    Args:
        model: A Hugging Face model with adapters, such as ``FocusedTransformer.backbone``.
        folder: Made if it is not there.

    Raises:
        SettingError: The model has no adapters.
    """
    from peft import get_peft_model_state_dict

    config = _adapter_config(model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    found = {
        f"{_PEFT_PREFIX}{name}": part.detach().contiguous().cpu()
        for name, part in get_peft_model_state_dict(model).items()
    }
    save_tensors(path / _ADAPTER_FILE, found, {"format": "pt"})
    config.save_pretrained(str(path))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts saved adapters in place of those of a model.

    Args:
        model: A Hugging Face model with adapters of the same blocks, modules and rank.
        folder: What :func:`save_adapter`, or peft, wrote.

    Raises:
        SettingError: The model has no adapters, there is no such file, or it is of other adapters.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _adapter_config(model)
    path = Path(folder) / _ADAPTER_FILE
    if not path.is_file():
        raise SettingError("folder", str(folder), f"has no {_ADAPTER_FILE}", "Name a folder that holds adapters.")
    try:
        found = {name.removeprefix(_PEFT_PREFIX): part for name, part in load_tensors(path).items()}
    except (OSError, ValueError) as error:
        raise SettingError("folder", str(folder), str(error), "Save the adapters again.") from error
    own = {name: part.shape for name, part in get_peft_model_state_dict(model).items()}
    if own != {name: part.shape for name, part in found.items()}:
        raise SettingError(
            "folder",
            str(folder),
            "holds adapters of other blocks, modules or rank",
            "Set model.lora and model.trainable as they were in training.",
        )
    set_peft_model_state_dict(model, found)


def _adapter_config(model: nn.Module) -> Any:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        raise SettingError("model.lora", None, "the model has no adapters", "Set model.lora.rank.")
    return next(iter(configs.values()))


def parameter_groups(module: nn.Module, weight_decay_on: str) -> list[Any]:
    """What an optimiser is given: all trained parameters, or those of vectors (norms, biases, gates) apart.

    Args:
        module: Its parameters that require gradients count.
        weight_decay_on: ``all``, or ``matrices``: vectors get a group without weight decay.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if weight_decay_on == "all":
        return trained
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
