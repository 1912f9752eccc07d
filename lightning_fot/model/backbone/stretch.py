"""Position extrapolation: a backbone's rotary embeddings stretched past the length that it was trained on.

The formulas are those of transformers, which keeps them in ``config.rope_parameters``: a folder that
``save_pretrained`` writes afterwards opens anywhere with the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_fot.config.backbone import RopeSettings
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.attachment import INTERFACE
from lightning_fot.model.backbone.layers import decoder_of, following_length, forget_length, rotary_modules, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Which text's length counts in this thread or task.
_LENGTH: ContextVar[object] = ContextVar("lightning_fot_length", default=None)


def stretch_positions(model: PreTrainedModel, settings: RopeSettings) -> None:
    """Changes what positions mean in a model, in its configuration and in its rotary modules.

    Args:
        model: A causal language model with plain rotary positions, without a memory attached.
        settings: Which formula, and how far.

    Raises:
        SettingError: The model has no rotary positions, or not plain ones that all layers share.

    Example:
        >>> from lightning_fot.pretrained import load_backbone
        >>> model = load_backbone("tiny-random-llama")
        >>> stretch_positions(model, RopeSettings("yarn", factor=4))
        >>> model.config.rope_parameters["rope_type"], model.config.max_position_embeddings
        ('yarn', 8192)
    """
    config = text_config(model)
    modules = rotary_modules(model)
    before: Any = getattr(config, "rope_parameters", None)
    if not modules or not before:
        raise _refused(settings, model, "has no rotary positions of transformers")
    if "rope_type" not in before:
        raise _refused(settings, model, f"has rotary positions of its own in layers of type {', '.join(before)}")
    if before["rope_type"] != "default":
        raise _refused(settings, model, f"already has rotary positions of type {before['rope_type']}")
    if config._attn_implementation == INTERFACE:
        raise _refused(settings, model, "has a memory attached")
    trained = settings.original_length or int(config.max_position_embeddings)
    config.rope_parameters = _parameters(settings, before, config, trained)
    # The dynamic formula takes it for the length of training; for the others it says how far they reach.
    config.max_position_embeddings = trained if settings.type == "dynamic" else round(trained * settings.factor)
    for name, module in modules.items():
        kind: Any = type(module)
        parent, _, last = name.rpartition(".")
        setattr(decoder_of(model).get_submodule(parent), last, kind(config=config).to(model.device))


@contextmanager
def at_length(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Positions inside the block are those of a text of ``length`` tokens, though it be read in parts.

    Frequencies that follow the length would else be those of each part, and keys of a KV cache rotated by others than
    the queries. Afterwards they are those of a short text again, as transformers leaves them.

    Args:
        model: Any; where frequencies are fixed, nothing is done.
        length: Tokens of the whole.
    """
    following = following_length(model)

    def with_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _LENGTH.get() is not whole:
            return None
        # What other texts have left there counts no more.
        forget_length(module)
        place = "position_ids" in kwargs
        positions: Tensor = kwargs["position_ids"] if place else args[1]
        longer = torch.cat([torch.full_like(positions[:, :1], length - 1), positions], dim=1)
        return (args, {**kwargs, "position_ids": longer}) if place else ((args[0], longer, *args[2:]), kwargs)

    def without_last(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        return (output[0][:, 1:], output[1][:, 1:]) if _LENGTH.get() is whole else None

    handles: list[Any] = []
    for module in following:
        handles += [module.register_forward_pre_hook(with_last, with_kwargs=True)]
        handles += [module.register_forward_hook(without_last)]
    # Texts that other threads read meanwhile have lengths of their own.
    whole = object()
    token = _LENGTH.set(whole)
    try:
        yield
    finally:
        _LENGTH.reset(token)
        for handle in handles:
            handle.remove()
        for module in following:
            forget_length(module)


def _parameters(settings: RopeSettings, before: dict[str, Any], config: Any, trained: int) -> dict[str, Any]:
    """The new ``rope_parameters``."""
    if settings.type == "ntk":
        # Static NTK-aware scaling is a larger base and nothing else; transformers' `dynamic` follows the length.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head_dim * before.get("partial_rotary_factor", 1.0))
        return {**before, "rope_theta": before["rope_theta"] * settings.factor ** (dim / (dim - 2))}
    changed = {**before, "rope_type": settings.type, "factor": float(settings.factor)}
    if settings.type == "yarn":
        changed["original_max_position_embeddings"] = trained
    return changed


def _refused(settings: RopeSettings, model: PreTrainedModel, problem: str) -> SettingError:
    return SettingError(
        "model.rope.type",
        settings.type,
        f"cannot be had: {type(model).__name__} {problem}",
        "Leave model.rope out, or use a backbone with plain rotary positions.",
    )
