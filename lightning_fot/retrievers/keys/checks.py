"""What is handed to stores and retrievers, checked: counts of keys and numbers of banks."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from lightning_fot.errors import SettingError

_FEW_NUMBERS = 4096


def all_finite(values: Tensor) -> bool:
    """Whether no number of a float32 tensor is NaN or infinite."""
    # One pass in place of three, but the sum of finite numbers, or of their squares, may overflow.
    if values.numel() <= _FEW_NUMBERS and values.device.type == "cpu":
        few = values.numpy()
        if isfinite(np.vdot(few, few)):
            return True
    elif isfinite(float(values.sum())):
        return True
    return bool(torch.isfinite(values).all())


def checked_counts(keys: Tensor, lengths: Tensor | Sequence[int] | None, banks: int, dim: int) -> list[int]:
    """Keys that each bank takes of keys (banks, n, dim).

    Args:
        keys: What is to be added.
        lengths: (banks,): bank b takes its first ``lengths[b]``; None takes all n.
        banks: Banks that there are.
        dim: Size of a key.

    Raises:
        SettingError: Shapes do not fit or a length is not in 0..n.
    """
    if keys.dim() != 3 or keys.shape[0] != banks or keys.shape[2] != dim:
        raise SettingError("keys", tuple(keys.shape), f"is not (banks={banks}, n, dim={dim})", "Pass one row a bank.")
    if not keys.is_floating_point():
        raise SettingError("keys", keys.dtype, "is not a floating dtype", "Convert the keys.")
    n = keys.shape[1]
    if lengths is None:
        return [n] * banks
    counts = [int(value) for value in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if len(counts) != banks or any(not 0 <= count <= n for count in counts):
        raise SettingError("lengths", counts, f"is not {banks} numbers from 0 to {n}", "One a bank.")
    return counts


def checked_banks(banks: Sequence[int] | None, total: int) -> list[int]:
    """Bank numbers as a list; None means all.

    Raises:
        SettingError: A number is not in 0..total-1.
    """
    if banks is None:
        return list(range(total))
    numbers = [int(bank) for bank in banks]
    if any(not 0 <= bank < total for bank in numbers):
        raise SettingError("banks", numbers, f"names a bank outside 0 to {total - 1}", "Correct it.")
    return numbers
