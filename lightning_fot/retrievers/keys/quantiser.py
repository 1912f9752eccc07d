"""Vectors in eight bits: one signed byte a coordinate and one half-precision scale a vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 127
_ENOUGH_TO_FIT = 16
_LEAST_SPREAD = 0.01  # of the size of the vectors: a text that repeats one token has no spread of its own
_NARROW = 16.0  # spreads that the largest coordinate of a typical vector has where the spreads are not its own
_FAR = 32.0  # the same of hardly any vectors: of some texts the first token is far from all others
_OFF = 0.5  # spreads: a mean that is nearer to zero is none, and would cost vectors that are much smaller their bits
_MOST_LOST = 0.03  # of a vector's largest coordinate: rounding of vectors that are much smaller than mean or spreads
_FINER = (
    2**-10
)  # of the widest spread: the unit of vectors that are coded alone, so that their scales are normal numbers
_LARGEST_SCALE = 60000.0  # just below what half precision holds


@dataclass(frozen=True)
class Quantiser:
    """``vector ≈ centre + spread · scale · code``, with centre and spread for each bank and coordinate.

    Attention keys share a large mean, and some coordinates are far wider than others: coded as they are, the rest would
    be lost in rounding. The scale follows each vector's largest coordinate, so nothing is ever cut off.

    Vectors that are much smaller than mean or spreads would be lost in turn. They are coded alone, ``vector ≈ unit ·
    |scale| · code``, which their scale says by its sign: below zero. So no coordinate is ever off by more than 3 % of
    the largest of its own vector, or than 1e-8 of the widest spread, whatever else the bank holds.

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
        centre = torch.zeros(vectors.shape[0], vectors.shape[2], dtype=torch.float32, device=vectors.device)
        spread = torch.ones_like(centre)
        for bank, count in enumerate(counts):
            sample = vectors[bank, :count].double()
            size = float(sample.square().mean().sqrt()) if count else 0.0
            if count >= _ENOUGH_TO_FIT and size:
                mean, deviation = sample.mean(0), sample.std(0)
                centre[bank] = mean.masked_fill(mean.abs() < _OFF * deviation, 0.0)
                # A coordinate that happens not to vary yet may do so later.
                spread[bank] = deviation.clamp_min(max(0.05 * float(deviation.mean()), _LEAST_SPREAD * size))
            else:
                # Around one, scales are far from the smallest numbers of half precision.
                spread[bank] = size or 1.0
        return cls(centre, spread.clamp_min(2**-100))

    def misfits(self, vectors: Tensor, counts: list[int], stored: list[int], few: int) -> list[int]:
        """Banks whose new vectors (banks, n, dim), ``counts[b]`` of them, need other spreads.

        That is where scales would leave half precision, where typical vectors would lose bits to spreads that are not
        theirs, and where the spreads were guessed from hardly any vectors and little is stored.

        Args:
            vectors: To be added.
            counts: How many of each bank.
            stored: Vectors that each bank holds.
            few: So many are coded anew at no cost.
        """
        found = []
        for bank, count in enumerate(counts):
            if not count:
                continue
            top = ((vectors[bank, :count].float() - self.centre[bank]) / self.spread[bank]).abs().amax(-1)
            enough = count >= _ENOUGH_TO_FIT
            if (
                not bool((top / _LEVELS < _LARGEST_SCALE).all())
                or float(top.median()) > (_NARROW if enough else _FAR)
                or (enough and stored[bank] <= few and self._guessed(bank))
            ):
                found.append(bank)
        return found

    def refitted(self, bank: int, old: Tensor, new: Tensor) -> Quantiser:
        """With the spreads of one bank such that vectors (n, dim), old and new, are coded well."""
        both = torch.cat((old, new))
        fitted = Quantiser.fit(both[None], [len(both)])
        centre, spread = self.centre.clone(), self.spread.clone()
        centre[bank] = fitted.centre[0]
        # Never narrower, but for a guess: texts that take turns end in one quantiser.
        guessed = self._guessed(bank)
        spread[bank] = fitted.spread[0] if guessed else torch.maximum(spread[bank], fitted.spread[0])
        return Quantiser(centre, spread)

    def _guessed(self, bank: int) -> bool:
        spread = self.spread[bank]
        return not bool(self.centre[bank].any()) and bool((spread == spread[0]).all())

    def select(self, banks: Tensor) -> Quantiser:
        """The quantiser of other banks, (n,) numbers."""
        index = banks.to(self.centre.device)
        return Quantiser(self.centre[index], self.spread[index])

    @property
    def unit(self) -> Tensor:
        """(banks,) float32: what vectors that are coded alone count in."""
        return self.spread.amax(-1) * _FINER

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (banks, n, dim) int8 and scales (banks, n) float16, negative ones of vectors that are coded alone.

        Args:
            vectors: (banks, n, dim), any floating dtype.
        """
        vectors, unit = vectors.float(), self.unit[:, None]
        flat = (vectors - self.centre[:, None]) / self.spread[:, None]
        sizes, own = flat.abs().amax(-1), vectors.abs().amax(-1)
        # The most that rounding can change a coordinate, the code's and that of scales which half precision cuts short.
        short = (sizes < _LEVELS * 2**-14) * (_LEVELS * 2**-25)
        lost = (sizes / _LEVELS / 2 + short) * self.spread.amax(-1)[:, None]
        alone = (lost > _MOST_LOST * own) & (own / unit / _LEVELS < _LARGEST_SCALE)
        flat = torch.where(alone[..., None], vectors / unit[..., None], flat)
        # Rounded up to half precision, so that no code leaves its byte.
        scales = (torch.where(alone, own / unit, sizes) / _LEVELS * (1 + 2**-10)).clamp_min(2**-24).half()
        codes = (flat / scales.float()[..., None]).round().clamp(-_LEVELS, _LEVELS)
        return codes.to(torch.int8), torch.where(alone, -scales, scales)

    def decode(self, codes: Tensor, scales: Tensor, banks: Tensor | int) -> Tensor:
        """Vectors (..., dim) float32 of codes (..., dim) and scales (...); ``banks`` is a number or has their shape."""
        sizes, spread, centre = scales.float()[..., None], self.spread[banks], self.centre[banks]
        if not bool((sizes < 0).any()):
            return codes.float() * sizes * spread + centre
        alone, unit = sizes < 0, self.unit[banks][..., None]
        return codes.float() * sizes.abs() * torch.where(alone, unit, spread) + centre.masked_fill(alone, 0.0)

    def scores(self, queries: Tensor, codes: Tensor, scales: Tensor, bank: int, out: Tensor) -> Tensor:
        """Inner products of queries (q, dim) float32 with vectors of one bank, of which nothing is decoded.

        Args:
            queries: Of one bank.
            codes: (n, dim).
            scales: (n,).
            bank: Its number.
            out: (q, n) float32, written to.
        """
        codes, sizes = codes.float().T, scales.float()
        # What belongs to a coordinate goes to the query: the codes themselves are multiplied once.
        torch.mm(queries * self.spread[bank], codes, out=out)
        out.mul_(sizes).add_((queries @ self.centre[bank])[:, None])
        alone = (sizes < 0).nonzero()[:, 0]
        if len(alone):
            out[:, alone] = (queries * self.unit[bank]) @ codes[:, alone] * sizes[alone].abs()
        return out
