"""What makes two models the same to a memory: stored keys depend on the weights below them."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning_fot.model.backbone.attachment import Attachment


_SAMPLED = 1024


def fingerprint(attached: Attachment) -> dict[str, Any]:
    """What a memory must share with the model that reads it, JSON-able.

    Stored keys depend on the weights of the memory layers and on all below them. The attention weights of memory layers
    are digested whole, the others by a thousand numbers of each parameter: a model of any size takes a moment.
    """
    digest = hashlib.sha256()
    top = max(attached.memory_layers, default=-1)
    for index in attached.memory_layers:
        for name, parameter in sorted(attached.attentions[index].named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name, parameter in attached.model.named_parameters():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer is not None and int(layer.group(1)) <= top:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    config = attached.model.config.get_text_config()
    return {
        "model_type": str(config.model_type),
        "memory_layers": list(attached.memory_layers),
        "kv_heads": [attached.facts[index].kv_heads for index in attached.memory_layers],
        "head_dim": [attached.facts[index].head_dim for index in attached.memory_layers],
        "positions": attached.config.positions,
        "score_factor": attached.score_factor,
        "dtype": attached.config.dtype or str(attached.model.dtype).removeprefix("torch."),
        "rotary": json.loads(json.dumps(getattr(config, "rope_parameters", None), default=str, sort_keys=True)),
        "weights": digest.hexdigest(),
    }
