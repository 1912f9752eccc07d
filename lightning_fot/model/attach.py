"""The two doors: attaching a memory to a model in hand, or to one opened by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_fot.config.attending import registry
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.attachment import INTERFACE, Attachment
from lightning_fot.model.backbone.layers import text_config
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained.backbones import check_backbone, load_backbone, pretrained_file
from lightning_fot.pretrained.longllama import GATES_FILE
from lightning_fot.pretrained.memory_settings import pretrained_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_memory(model: PreTrainedModel, config: MemoryConfig | None = None) -> MemoryLM:
    """Gives a Hugging Face model an external memory.

    Args:
        model: A causal language model of transformers, on any device, in any floating dtype.
        config: Which layers attend to the memory, and how; None is for models that were not trained to use one
            (:meth:`MemoryConfig.training_free`).

    Returns:
        The attached model. ``detach()`` (or leaving a ``with`` block) makes the model what it was, bit for bit.

    Raises:
        SettingError: A layer is out of range, the retriever or one of its arguments is unknown or out of its bounds, or
            a self-test finds that the model cannot be served.
        MissingLibraryError: The retriever's library is not installed.

    Example:
        >>> from lightning_fot import MemoryConfig, attach_memory
        >>> from lightning_fot.pretrained import load_backbone
        >>> import torch
        >>> with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[1], window=16)) as lm:
        ...     out = lm(torch.arange(40)[None])
        >>> out.logits.shape, len(out.memory)
        (torch.Size([1, 40, 384]), 40)
    """
    if text_config(model)._attn_implementation == INTERFACE:
        raise SettingError(
            "model", type(model).__name__, "already has a memory attached", "Call detach() on the first one."
        )
    return MemoryLM(Attachment(model, MemoryConfig.training_free() if config is None else config))


def attach_pretrained(name: str, weights_dtype: str = "float32", **settings: Any) -> MemoryLM:
    """Loads a backbone and attaches the memory that it was trained with.

    Args:
        name: A LongLLaMA (folder or hub id), a folder that ``save_pretrained`` of an attached model wrote, or any other
            backbone (see :func:`check_backbone`), whose settings are the defaults of ``MemoryConfig``.
        weights_dtype: ``float32`` or ``bfloat16``.
        **settings: Fields of ``MemoryConfig`` in place of the checkpoint's. A LongLLaMA says nothing of ``top_k`` and
            ``retriever``; see :func:`lightning_fot.pretrained.longllama.memory_settings`.

    Raises:
        SettingError: The backbone or a setting cannot work.

    Example:
        >>> from lightning_fot import attach_pretrained
        >>> with attach_pretrained("tiny-random-llama", memory_layers=[1], window=16) as lm:
        ...     lm.config.window
        16
    """
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

    from lightning_fot.system.tensor_files import load_tensors

    if not registry.read(pretrained_settings(name).get("attending")).learns:
        return
    file = pretrained_file(name, GATES_FILE)
    try:
        saved = load_tensors(file) if file is not None else {}
        with torch.no_grad():
            for layer, gate in lm.gates.items():
                if layer in saved:
                    gate.copy_(saved[layer])
    except (OSError, RuntimeError, ValueError) as error:
        raise _damaged_gates(name, str(error)) from error
    if not saved:
        raise _damaged_gates(name, "missing")


def _damaged_gates(name: str, reason: str) -> SettingError:
    return SettingError("model.backbone", name, f"{GATES_FILE} cannot be used ({reason})", "Save the model again.")
