"""Tensors on their way between processes: as arrays, which Ray neither copies nor pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor as an array.

    Args:
        data: Its values; 16-bit ones that NumPy does not know as integers.
        dtype: Name of its dtype.
    """

    data: np.ndarray[Any, Any]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return int(self.data.nbytes)


def pack(tensor: Tensor) -> Packed:
    """A tensor to be sent; later changes of it may or may not be seen."""
    name = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach().cpu().contiguous()
    return Packed((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), name)


def unpack(packed: Packed) -> Tensor:
    """The tensor, to be read and written."""
    # What comes out of shared memory is read only, which torch does not know.
    data = packed.data if packed.data.flags.writeable else packed.data.copy()
    tensor = torch.from_numpy(data)
    return tensor.view(torch.bfloat16) if packed.dtype == "bfloat16" else tensor
