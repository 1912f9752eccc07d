"""Factors of low rank beside linear maps (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRank(nn.Module):
    """A linear map with factors beside it: ``y = W x + B (A x)``.

    Args:
        linear: The map; it is not trained.
        rank: Of the factors.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = self.linear(x) + functional.linear(functional.linear(x, self.a), self.b)
        return y


def add_factors(model: nn.Module, first: int, rank: int) -> dict[str, LowRank]:
    """Puts factors beside all linear maps of the layers from ``first`` on; returns them by the name of the weight."""
    found = {}
    layers: Any = model.get_submodule("model.layers")
    for number in range(first, len(layers)):
        for name, linear in list(layers[number].named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, own = name.rpartition(".")
                found[f"model.layers.{number}.{name}.weight"] = LowRank(linear, rank)
                setattr(layers[number].get_submodule(parent), own, found[f"model.layers.{number}.{name}.weight"])
    return found
