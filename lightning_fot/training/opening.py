"""Opens a backbone, its memory layers and a checkpoint of their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule

from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.model.attach import attach_memory, load_gates
from lightning_fot.pretrained.backbones import load_backbone, load_tokenizer
from lightning_fot.system.digests import check_zip
from lightning_fot.training.module import FocusedTransformer
from lightning_fot.training.parameters import merge_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.model.lm import MemoryLM
    from lightning_fot.request.model import ModelSettings


FOR_WEIGHTS = ("state_dict", "global_step")
_FOR_TRAINING = (*FOR_WEIGHTS, "epoch", "loops", "optimizer_states", "lr_schedulers")
_KINDS: dict[str, type] = {
    "state_dict": dict,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def open_model(settings: ModelSettings) -> tuple[MemoryLM, PreTrainedTokenizerBase]:
    """Loads a model with its memory layers, on the GPU where there is one, and its tokenizer.

    Args:
        settings: Backbone, memory layers and checkpoint, checked.

    Raises:
        SettingError: The checkpoint belongs to another model, or a layer cannot have a memory.
    """
    tokenizer = load_tokenizer(settings.backbone)
    if settings.checkpoint is None:
        lm = attach_memory(load_backbone(settings.backbone, settings.dtype), settings.config)
        load_gates(lm, settings.backbone)
    else:
        module = FocusedTransformer(settings.backbone, settings.config, dtype=settings.dtype)  # type: ignore[arg-type]
        load_trained(module, settings.checkpoint)
        lm = module.lm
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(lm.model, device)
    lm.gates.to(device)
    lm.eval()
    return lm, tokenizer


def open_trained(settings: Mapping[str, Any], checkpoint: Path) -> tuple[FocusedTransformer, int]:
    """The module of a run with a checkpoint's weights, adapters merged.

    Args:
        settings: Section ``model`` of the run's resolved configuration.
        checkpoint: File of that run.

    Returns:
        The module, and after how many steps the checkpoint was written.
    """
    chosen = {name: settings[name] for name in ("trainable", "dtype") if name in settings}
    module = FocusedTransformer(settings["backbone"], MemoryConfig(**settings["memory"]), **chosen)
    loaded = load_trained(module, checkpoint)
    if module.lora is not None:
        merge_lora(module.lm.model)
    return module, int(loaded["global_step"])


def load_trained(model: LightningModule, checkpoint: Any) -> dict[str, Any]:
    """Puts a checkpoint's weights into a model whose training has ended.

    Returns:
        The checkpoint.

    Raises:
        SettingError: It is damaged, or belongs to another model.
    """
    loaded = read_checkpoint(Path(checkpoint), FOR_WEIGHTS)
    model.on_load_checkpoint(loaded)
    model.load_state_dict(loaded["state_dict"], strict=False)
    return loaded


def check_checkpoint(checkpoint: Path) -> None:
    """Reads a checkpoint that a training is to go on from, before Lightning does.

    Raises:
        SettingError: It is none, or is damaged or altered.
    """
    read_checkpoint(checkpoint, _FOR_TRAINING, mapped=True)


def read_checkpoint(checkpoint: Path, needed: Sequence[str], mapped: bool = False) -> dict[str, Any]:
    """A checkpoint's contents, compared with the sums that torch wrote beside its parts.

    Args:
        checkpoint: The file.
        needed: What it has to hold.
        mapped: Leave its tensors on the disk until they are used.

    Raises:
        SettingError: It is none, or is damaged or altered.
    """
    try:
        check_zip(checkpoint)
        # Numbers only: nothing in a checkpoint can run code when it is loaded.
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # Anything: a file that is no checkpoint may hold any bytes, and torch's reader trusts them.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise _unreadable(checkpoint, reason) from error
    missing = [name for name in needed if name not in loaded] if isinstance(loaded, dict) else list(needed)
    if missing:
        raise _unreadable(checkpoint, f"is no checkpoint of Lightning: lacks {', '.join(missing)}")
    for name in needed:
        if not isinstance(loaded[name], _KINDS.get(name, object)):
            raise _unreadable(checkpoint, f"its {name} is of the wrong kind, {type(loaded[name]).__name__}")
    return dict(loaded)


def _unreadable(checkpoint: Path, reason: str) -> SettingError:
    return SettingError(
        "ckpt_path", str(checkpoint), f"cannot be used: {reason}", "Give another checkpoint, or train again."
    )
