"""Triton kernels for a GPU. Optional: torch code elsewhere is the reference, and gives the same answers.

They are used where Triton is installed, tensors lie on a GPU and ``LIGHTNING_FOT_TRITON=1`` is set. That is not the
default, since no GPU has run them yet: ``benchmarks/gpu.py`` does, first thing.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor


@lru_cache(maxsize=1)
def _wanted() -> bool:
    return os.environ.get("LIGHTNING_FOT_TRITON", "0") == "1" and find_spec("triton") is not None


def serves(tensor: Tensor) -> bool:
    """Whether kernels are used for what lies where this tensor lies."""
    return tensor.is_cuda and _wanted()
