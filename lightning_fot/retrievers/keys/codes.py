"""Keys in eight bits with a bound on what that loses: a single query then reads a quarter of the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows are coded a chunk at a time, and looked at a group at a time: one scale, one bound, one largest product each.
CHUNK = 1024
GROUP = 32
_APART = CHUNK // GROUP  # rows between two of a group, so that the largest product of many groups is found at once
_SHIFT = _APART.bit_length() - 1  # _APART is a power of two
_INSIDE = np.arange(0, CHUNK, _APART)
_LEVELS = 127
_LARGEST = 1e30
_TINY = 1e-30
_LEAST, _SMALLEST = np.float32(_TINY), np.float32(2**-100)
_USUAL = (1e-6, 1e6)  # queries whose largest coordinate lies between are taken as they are
_EXPONENT = np.int32(0x7F800000)  # the bits of a float32 that make a power of two

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coded:
    """The first rows of a bank: ``rotation @ (key - centre) = scale · code + what is lost``.

    Keys share a large mean, and their wide coordinates are those of the queries too: centred and rotated, all
    coordinates are alike, and 8 bits lose least. Both leave the order of the scores as it is.

    The score of a query q, coded as ``step · p`` with f left over, then lies within
    ``|q| · lost + |f| · norm`` of ``step · scale · (p · code)``, by Cauchy-Schwarz.

    Args:
        codes: (n, D) int8, n a multiple of ``CHUNK``.
        scales: (n / GROUP,) float32.
        errors: (2, n / GROUP) float32, in each group the largest norm of what is lost, rounding included, and the
            largest norm of ``scale · code``.
        centre: (D,) float32.
    """

    codes: Tensor
    scales: Floats
    errors: Floats
    centre: Tensor

    @property
    def size(self) -> int:
        """Rows n."""
        return self.codes.shape[0]

    def first(self, size: int) -> Coded:
        """The same of the first ``size`` rows, a multiple of ``CHUNK``; nothing is copied."""
        groups = size // GROUP
        return Coded(self.codes[:size], self.scales[:groups], self.errors[:, :groups], self.centre)


@dataclass(frozen=True)
class CodedQueries:
    """Queries as :class:`Coded` is multiplied with: ``rotation @ unit = step · (code + what is left)``.

    Args:
        units: (q, D) float32, the queries divided by ``sizes``.
        sizes: (q, 1) float32, powers of two: dividing by them rounds nothing, and no norm overflows afterwards. None
            where all are 1.
        codes: (q, D) int8.
        norms: (q, 2) float32, norms of the units and of what is left, in steps.
    """

    units: Tensor
    sizes: Floats | None
    codes: NDArray[np.int8]
    norms: Floats

    @classmethod
    def of(cls, queries: Tensor) -> CodedQueries:
        """Of queries (q, D) float32 on the CPU."""
        # numpy takes a fraction of the microseconds that torch needs for a call.
        turned: Floats = (queries @ rotation(queries.shape[1])).numpy()
        tops, sizes = np.abs(turned).max(1, keepdims=True), None
        if not all(_USUAL[0] < top < _USUAL[1] for top in tops[:, 0].tolist()):
            sizes = _powers_of_two(queries.numpy())
            queries = torch.from_numpy(queries.numpy() / sizes)
            turned = (queries @ rotation(queries.shape[1])).numpy()
            tops = np.maximum(np.abs(turned).max(1, keepdims=True), _LEAST)
        turned *= _LEVELS / tops
        codes = np.rint(turned)
        norms = np.empty((len(turned), 2), dtype=np.float32)
        np.einsum("qd,qd->q", turned, turned, out=norms[:, 0])
        turned -= codes
        np.einsum("qd,qd->q", turned, turned, out=norms[:, 1])
        np.sqrt(norms, out=norms)
        return cls(queries, sizes, codes.astype(np.int8), np.maximum(norms, _LEAST, out=norms))

    def bounds(self, products: NDArray[np.int32], coded: Coded) -> tuple[Floats, Floats]:
        """What the score of a key with these products, less the query's with the centre, is at least and at most.

        No bound is NaN: of the norms none is 0, and of the errors only those of what is lost may be infinite.

        Args:
            products: (q, n / GROUP) of the codes, one for each group.
            coded: Of n rows.

        Returns:
            Lowest and highest scores (q, n / GROUP), in steps.
        """
        middle = products.astype(np.float32)
        middle *= coded.scales
        slack = self.norms[:, :1] * coded.errors[0]
        slack += self.norms[:, 1:] * coded.errors[1]
        return middle - slack, np.add(middle, slack, out=middle)


def _powers_of_two(queries: Floats) -> Floats:
    tops = np.abs(queries).max(1, keepdims=True)
    powers: Floats = np.maximum((tops.view(np.int32) & _EXPONENT).view(np.float32), _SMALLEST)
    return powers


def members(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows (..., GROUP) of groups (...)."""
    # The chunk's first row, and the place within its first _APART rows.
    firsts = (groups >> _SHIFT) * (CHUNK - _APART)
    firsts += groups
    rows: NDArray[np.int64] = firsts[..., None] + _INSIDE
    return rows


def largest(products: Tensor) -> NDArray[np.int32]:
    """The largest product in each group, (q, n / GROUP), of products (q, n) int32."""
    tops: NDArray[np.int32] = products.view(len(products), -1, GROUP, _APART).amax(2).flatten(1).numpy()
    return tops


@lru_cache(maxsize=8)
def rotation(dim: int) -> Tensor:
    """An orthogonal matrix (dim, dim) float32, always the same: vectors times it have coordinates of one size."""
    generator = torch.Generator().manual_seed(0)
    matrix: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return matrix.float().contiguous()


class CodeBook:
    """The codes of one bank of a segment, made of whole chunks when a search first needs them.

    What was handed out never changes: it may be searched while another thread adds to the book.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._size = 0
        self._coded: Coded | None = None
        self._latest: Coded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included: about D + 0.4 a key."""
        coded = self._coded
        return 0 if coded is None else coded.codes.numel() + 4 * (3 * len(coded.scales) + len(coded.centre))

    def cut(self, size: int) -> None:
        """Rows from ``size`` on are about to change."""
        with self._lock:
            self._size = min(self._size, size // CHUNK * CHUNK)
            self._latest = None

    def upto(self, keys: Tensor) -> Coded | None:
        """Codes of the whole chunks of keys (n, D) floating, on the CPU; None where there is not one."""
        size = len(keys) // CHUNK * CHUNK
        if not size:
            return None
        with self._lock:
            if self._latest is None or self._latest.size != size:
                if self._size < size:
                    self._extend(keys[:size])
                assert self._coded is not None
                self._latest = self._coded.first(size)
            return self._latest

    def _extend(self, keys: Tensor) -> None:
        size, old = len(keys), self._coded
        if old is None or not self._size:
            # The median: a few huge keys do not carry it away.
            old = _room(size, keys[:CHUNK].float().median(0).values)
        elif size > old.size:
            grown = _room(max(size, old.size + old.size // 2 // CHUNK * CHUNK), old.centre)
            _write(grown, 0, old.first(self._size))
            old = grown
        for start in range(self._size, size, CHUNK):
            _write(old, start, _code(keys[start : start + CHUNK], old.centre))
        self._coded, self._size = old, size


def _room(size: int, centre: Tensor) -> Coded:
    numbers = np.empty((3, size // GROUP), dtype=np.float32)
    return Coded(torch.empty(size, len(centre), dtype=torch.int8), numbers[0], numbers[1:], centre)


def _write(target: Coded, start: int, source: Coded) -> None:
    target.codes[start : start + source.size] = source.codes
    groups = slice(start // GROUP, (start + source.size) // GROUP)
    target.scales[groups], target.errors[:, groups] = source.scales, source.errors


def _code(keys: Tensor, centre: Tensor) -> Coded:
    """Codes of one chunk of keys (CHUNK, D)."""
    keys, dim = keys.float(), keys.shape[1]
    turned = ((keys - centre) @ rotation(dim)).view(GROUP, _APART, dim)
    scales = turned.abs().amax((0, 2)) / _LEVELS
    # In units of the scale, so that nothing underflows when it is squared.
    units = turned / torch.where(scales > 0, scales, 1)[:, None]
    codes = units.round().clamp_(-_LEVELS, _LEVELS)
    lost = scales * (units - codes).norm(dim=2).amax(0)
    norms = scales * codes.norm(dim=2).amax(0)
    # What float32 may round off in the two rotations and in the score that is compared with, at the very worst.
    sizes = dim**0.5 * (keys.abs().view(GROUP, _APART, dim).amax((0, 2)) + centre.abs().max())
    lost += 4 * dim**1.5 * 2**-24 * sizes + _TINY
    # Keys too large for this arithmetic: a bound that is never met, so that they are always scored exactly.
    wild = ~(sizes < _LARGEST) | ~(lost < _LARGEST)
    codes = codes.masked_fill(wild[:, None], 0).to(torch.int8).view(CHUNK, dim)
    errors = torch.stack((lost.masked_fill(wild, float("inf")), norms.masked_fill(wild, 0)))
    return Coded(codes, scales.masked_fill(wild, 0).numpy(), errors.numpy(), centre)
