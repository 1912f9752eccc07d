"""Vectors in eight bits: one signed byte a coordinate and one half-precision scale a vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 127
_ENOUGH_TO_FIT = 16


@dataclass(frozen=True)
class Quantiser:
    """``vector ≈ centre + spread · scale · code``, with centre and spread for each bank and coordinate.

    Attention keys share a large mean, and some coordinates are far wider than others: coded as they are, the rest would
    be lost in rounding. The scale follows each vector's largest coordinate, so nothing is ever cut off.

    Args:
        centre: (banks, dim) float32.
        spread: (banks, dim) float32, positive.
    """

    centre: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, counts: list[int]) -> Quantiser:
        """Mean and standard deviation of the first vectors (banks, n, dim), of which bank b has ``counts[b]``.

        Banks with too few are coded around zero with one spread for all coordinates, which is less exact.
        """
        centre = torch.zeros(vectors.shape[0], vectors.shape[2], device=vectors.device)
        size = float(vectors.float().square().mean().sqrt()) if vectors.numel() else 0.0
        # Around one, scales are far from the smallest numbers of half precision.
        spread = torch.full_like(centre, size or 1.0)
        for bank, count in enumerate(counts):
            if count >= _ENOUGH_TO_FIT:
                sample = vectors[bank, :count].float()
                centre[bank] = sample.mean(0)
                deviation = sample.std(0)
                # A coordinate that happens not to vary yet may do so later.
                spread[bank] = deviation.clamp_min(0.05 * float(deviation.mean()) + 1e-12)
        return cls(centre, spread)

    def select(self, banks: Tensor) -> Quantiser:
        """The quantiser of other banks, (n,) numbers."""
        index = banks.to(self.centre.device)
        return Quantiser(self.centre[index], self.spread[index])

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (banks, n, dim) int8 and scales (banks, n) float16 of vectors (banks, n, dim)."""
        flat = (vectors.float() - self.centre[:, None]) / self.spread[:, None]
        # Rounded up to half precision, so that no code leaves its byte.
        scales = (flat.abs().amax(-1) / _LEVELS * (1 + 2**-10)).clamp_min(2**-24).half()
        codes = (flat / scales.float()[..., None]).round().clamp(-_LEVELS, _LEVELS)
        return codes.to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor, banks: Tensor | int) -> Tensor:
        """Vectors (..., dim) float32 of codes (..., dim) and scales (...); ``banks`` is a number or has their shape."""
        return codes.float() * scales.float()[..., None] * self.spread[banks] + self.centre[banks]
