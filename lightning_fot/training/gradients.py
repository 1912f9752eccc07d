"""Whether gradients are finite: one question to the device for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def not_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter with a gradient that is not finite, None where all are.

    Their largest absolute value is asked for as a whole, so that the device is waited for once a step and not once a
    parameter; only where that is not finite, each is looked at. A sum or an Euclidean norm would overflow before the
    gradients do.

    Args:
        parameters: With their names; those without a gradient are left out. Sharded ones (DTensor) count on all ranks,
            which must ask together.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1e38, 1e38])
        >>> not_finite([("weight", weight)]) is None
        True
    """
    found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    if not found or _finite(list(found.values())):
        return None
    return next((name for name, gradient in found.items() if not _finite([gradient])), None)


def _finite(gradients: list[torch.Tensor]) -> bool:
    largest: Any = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)
    if hasattr(largest, "full_tensor"):
        largest = largest.full_tensor()
    return bool(torch.isfinite(largest))
