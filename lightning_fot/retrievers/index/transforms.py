"""Maps that leave attention unchanged but make keys easier to index (retrievers.md, section 2).

The score of a query against all keys changes by a constant and a positive factor only, so the ranking is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.config.retriever import TransformSpec

_EIGENVALUE_FLOOR = 1e-3
_MIN_QUERIES_PER_DIM = 4
USUAL = 2.0**20  # sizes of keys and queries between its inverse and itself are taken as they are
_LONGEST = 1024.0  # lengths of the median key: longer ones are not typical
_FARTHEST = 64.0  # lengths of a typical key: what is longer is an outlier, without any map too
_FEW = 16
# The share of the keys that are typical. A few long ones are among the best of half of all queries: a graph would have
# them as neighbours of everything, and without them the sphere that keys are laid on is no wider than it must be.
_TYPICAL = 1 - 1 / 32


@dataclass(frozen=True)
class FittedTransform:
    """A transform with its constants, fitted when an index is built.

    Attributes:
        mean: (D,) subtracted from keys; zero where they are not centred.
        centre: (D,) mean of the keys in any case: a vector that no query looks for.
        key_map: (D, D) applied to centred keys, or None.
        query_map: (D, D) applied to queries, the inverse transpose of ``key_map``, or None.
        radius: Keys longer than this after the maps are outliers; they are shortened to it for the index.
        l2_augment: Whether one coordinate is added.
        scale: A power of two that keys are multiplied with, since libraries square them in single precision: beyond
            1e19 that ends the process. 1 for usual keys.
    """

    mean: Tensor
    centre: Tensor
    key_map: Tensor | None
    query_map: Tensor | None
    radius: float
    l2_augment: bool
    scale: float = 1.0

    @property
    def dim(self) -> int:
        """Coordinates of transformed vectors."""
        return self.mean.shape[0] + int(self.l2_augment)

    def keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Transform keys.

        Args:
            keys: (n, D), any floating dtype.

        Returns:
            (n, dim) float32 contiguous, and the positions of outliers (m,) int64. Shortening outliers keeps one huge
            key from spoiling cells and distances; whoever uses the index scores them exactly.
        """
        moved = _map(_scaled(keys.float(), self.mean, self.scale), self.key_map)
        norms = moved.norm(dim=1)
        outliers = (~(norms <= self.radius)).nonzero().squeeze(1)
        if len(outliers):
            shorter = moved[outliers] * (self.radius / norms[outliers]).unsqueeze(1)
            # A length that overflows leaves nothing, or no number.
            moved[outliers] = shorter.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            norms[outliers] = moved[outliers].norm(dim=1)
        if self.l2_augment:
            # |k'| = R for all keys, so |q - k'|^2 = R^2 + |q|^2 - 2 q.k orders like the inner product.
            extra = (self.radius**2 - norms.square()).clamp_min(0).sqrt()
            moved = torch.cat((moved, extra.unsqueeze(1)), dim=1)
        return moved.contiguous(), outliers

    def queries(self, queries: Tensor) -> NDArray[np.float32]:
        """Transform queries (q, D) float32 on the CPU to (q, dim) float32 contiguous, of norm ``radius`` for L2."""
        matrix = self._query_matrix
        if len(queries) <= _FEW:
            # One matrix product and no more: numpy takes a fraction of the microseconds that torch needs for a call.
            few: NDArray[np.float32] = queries.numpy()
            if self._few_matrix is not None:
                few = few @ self._few_matrix
            if self.l2_augment and len(few) == 1:
                few *= self.radius / max(math.sqrt(np.vdot(few, few)), 1e-20)
            elif self.l2_augment:
                few *= self.radius / np.maximum(np.sqrt(np.einsum("ij,ij->i", few, few)), 1e-20)[:, None]
            return few
        moved = queries if matrix is None else queries @ matrix
        if self.l2_augment:
            # Same order of size as the keys: squared distances then lose no digits.
            moved.mul_(self.radius / moved.norm(dim=1, keepdim=True).clamp_min(1e-20))
        return moved.contiguous().numpy()

    def lengths(self, queries: Tensor) -> NDArray[np.float32]:
        """(q, 1): what a distance between transformed keys is at most, times this, as a difference of raw scores."""
        moved = queries.cpu() if self.query_map is None else queries.cpu() @ self.query_map
        lengths: NDArray[np.float32] = moved.norm(dim=1, keepdim=True).numpy() / np.float32(self.scale)
        return lengths

    @cached_property
    def _few_matrix(self) -> NDArray[np.float32] | None:
        return None if self._query_matrix is None else self._query_matrix.numpy()

    @cached_property
    def _query_matrix(self) -> Tensor | None:
        """(D, dim) that queries are multiplied with, the added coordinate's zeros included; None for none."""
        if not self.l2_augment:
            return self.query_map
        square = torch.eye(self.mean.shape[0], dtype=torch.float32) if self.query_map is None else self.query_map
        return torch.nn.functional.pad(square, (0, 1)).contiguous()


def fit_transform(keys: Tensor, past_queries: Tensor | None, spec: TransformSpec) -> FittedTransform:
    """Fit a transform to the keys that an index is built on.

    Args:
        keys: (n, D) of one bank, any floating dtype.
        past_queries: (m, D) seen before, float32; too few (below 4 D) and the query-aware map is left out.
        spec: Which maps.
    """
    scale = _scale_of(keys)
    keys = keys.float()
    centre = _robust_mean(keys * scale) / scale
    mean = centre if spec.center else torch.zeros_like(centre)
    key_map = query_map = None
    if spec.query_power and past_queries is not None and len(past_queries) >= _MIN_QUERIES_PER_DIM * keys.shape[1]:
        moment = (past_queries.T.double() @ past_queries.double()) / len(past_queries)
        values, vectors = torch.linalg.eigh(moment)
        if float(values[-1]) > 0:
            values = values.clamp_min(_EIGENVALUE_FLOOR * float(values[-1])) / float(values[-1])
            key_map = ((vectors * values**spec.query_power) @ vectors.T).float()
            query_map = ((vectors * values**-spec.query_power) @ vectors.T).float()
    norms = _map(_scaled(keys, mean, scale), key_map).norm(dim=1).nan_to_num(nan=float("inf"))
    typical = float(norms.kthvalue(max(1, int(_TYPICAL * len(norms)))).values)
    # However many are far longer than most: beside them, distances of the others would have no digits left.
    typical = min(typical, _LONGEST * float(norms.median()))
    if spec != TransformSpec():
        # Some room above: keys added later are a little longer.
        radius = max(1.1 * min(float(norms.max()), 1.5 * typical), 1e-6)
    else:
        radius = _FARTHEST * max(typical, 1e-6)
    return FittedTransform(mean, centre, key_map, query_map, radius, spec.l2_augment, scale)


def usual_size(queries: Tensor) -> Tensor:
    """Queries (..., D) float32, of usual size: others are divided by a power of two, which changes no ranking."""
    top = queries.abs().amax(dim=-1, keepdim=True) if queries.numel() else queries
    on_host = queries.device.type in ("cpu", "mps")  # elsewhere, looking first would make the host wait
    if not queries.numel() or (on_host and bool(((top <= USUAL) & ((top >= 1 / USUAL) | (top == 0))).all())):
        return queries
    _, power = torch.frexp(top)
    unusual = (top > USUAL) | ((top < 1 / USUAL) & (top > 0))
    # In two steps: one factor alone may not be a number of single precision.
    half = power.masked_fill(~unusual, 0) // 2
    return torch.ldexp(torch.ldexp(queries, -half), half - power.masked_fill(~unusual, 0))


def _scale_of(keys: Tensor) -> float:
    """A power of two that gives typical keys (n, D) a size near one; 1 where they are not far from that."""
    middle = float(keys.float().abs().amax(dim=1).median())
    if middle == 0 or 1 / USUAL <= middle <= USUAL:
        return 1.0
    return float(2.0 ** max(-120, min(120, -round(math.log2(middle)))))


def _scaled(keys: Tensor, mean: Tensor, scale: float) -> Tensor:
    return keys - mean if scale == 1 else keys * scale - mean * scale


def _robust_mean(keys: Tensor) -> Tensor:
    """Mean of the keys of usual length: one huge key must not carry the centre away."""
    norms = keys.norm(dim=1)
    return keys[norms <= 4 * norms.median()].mean(dim=0)


def _map(vectors: Tensor, matrix: Tensor | None) -> Tensor:
    return vectors if matrix is None else vectors @ matrix
