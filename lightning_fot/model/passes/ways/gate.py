"""Gates (Memorizing Transformers, arXiv 2203.08913): each head mixes memory and local context by a learned share.

The mix itself is :func:`lightning_fot.model.attention.softmax.attend`, which is given the logit of the share.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_fot.config.attending.gate import Settings
from lightning_fot.model.passes.way import Attached, WayOfAttending, register


@register
class GateWay(WayOfAttending):
    """FoT's passes with a gate in each memory layer."""

    settings_type = Settings

    def gates(self, attached: Attached) -> nn.ParameterDict:
        """sigmoid(0): memory and local context weigh alike before training."""
        return nn.ParameterDict(
            {
                str(index): nn.Parameter(
                    torch.zeros(attached.facts[index].heads, dtype=torch.float32, device=attached.device)
                )
                for index in attached.memory_layers
            }
        )
