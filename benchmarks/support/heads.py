"""Recorded keys and queries of heads, stretched where more keys are asked for, and what rows found are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from support.pairs import Pairs
from torch import Tensor

from lightning_fot.bench import load_qk

_QUERY_BLOCK = 64
_KEY_BLOCK = 65536


@dataclass(frozen=True)
class Head:
    """What one KV head holds and is asked.

    Args:
        name: As in the file; with its bank's number where a name has several.
        keys: (N, D) float32.
        queries: (Q, D) float32 that are measured.
        past: (P, D) float32 that indexes may learn from, or None.
        recorded: Keys that are recorded ones; those behind them are stretched.
        noise: Of stretched keys, as a share of the spread within their cell.
    """

    name: str
    keys: Tensor
    queries: Tensor
    past: Tensor | None
    recorded: int
    noise: float

    def sized(self, tokens: int, number: int = 0) -> Head:
        """The same head with so many keys: the first recorded ones, then stretched ones (see ``support/pairs.py``).

        Args:
            tokens: Keys wanted.
            number: Seeds what is drawn.
        """
        if tokens <= len(self.keys):
            return replace(self, keys=self.keys[:tokens], recorded=min(tokens, self.recorded))
        # Values are not searched: stretched ones of width 0 cost nothing.
        real = {number: self.keys[None]}
        pairs = Pairs(real, {number: self.keys[None, :, :0]}, {number: self.queries[None]}, self.noise)
        parts = [block[number][0][0, 0] for block in pairs.blocks(0, tokens)]
        return replace(self, keys=torch.cat(parts))

    def batch(self, size: int) -> Tensor:
        """(1, size, D) queries; recorded ones come again where there are too few."""
        times = math.ceil(size / len(self.queries))
        return self.queries.repeat(times, 1)[None, :size].contiguous()

    def says(self) -> str:
        """Where the keys are from, in a line."""
        stretched = len(self.keys) - self.recorded
        more = f" and {stretched:,} stretched from them (share of noise {self.noise:g})" if stretched else ""
        return f"{self.name}: {self.recorded:,} recorded keys{more}, {len(self.queries)} recorded queries"


def read_heads(file: Path, noise: float, names: Sequence[str] = ()) -> list[Head]:
    """All heads of a file that :func:`lightning_fot.bench.load_qk` reads.

    Args:
        file: ``.npz`` or ``.safetensors``.
        noise: Of keys that will be stretched.
        names: Those wanted; none means all.

    Raises:
        SettingError: The file holds no keys and queries.
        KeyError: A wanted name is not in it.
    """
    found: dict[str, Head] = {}
    for name, tensors in load_qk(file).items():
        keys, queries, past = tensors["keys"], tensors["queries"], tensors.get("past_queries")
        for bank in range(len(keys)):
            label = name if len(keys) == 1 else f"{name}.{bank}"
            seen = None if past is None else past[bank].contiguous()
            found[label] = Head(label, keys[bank].contiguous(), queries[bank].contiguous(), seen, keys.shape[1], noise)
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"{', '.join(missing)}; there are {', '.join(found)}")
    return [found[name] for name in names] if names else list(found.values())


class Truth:
    """Scores that found rows are judged by, in float64: one pass over all keys for the k best and the whole mass.

    Args:
        head: Keys and queries; the softmax's scale is 1 / sqrt(D).
        k: Neighbours wanted.
    """

    def __init__(self, head: Head, k: int) -> None:
        self.keys, self.queries, self.k = head.keys, head.queries, k
        self.scale = 1 / math.sqrt(head.keys.shape[1])
        best, everything = [], []
        for part in torch.split(head.queries.double(), _QUERY_BLOCK):
            top, total = part.new_empty(len(part), 0), part.new_full((len(part),), float("-inf"))
            for keys in torch.split(head.keys, _KEY_BLOCK):
                scores = part @ keys.double().T
                top = torch.cat((top, scores.topk(min(k, len(keys)), dim=1).values), 1)
                total = torch.logaddexp(total, (self.scale * scores).logsumexp(1))
            best.append(top.topk(k, dim=1).values)
            everything.append(total)
        self.best, self.everything = torch.cat(best), torch.cat(everything)

    def judge(self, rows: Tensor) -> dict[str, float]:
        """Recall and mass of rows (Q, k) found for the head's queries; -1 where none was found.

        Returns:
            ``recall``: share of the k whose score reaches the k-th best, so that ties are no misses. ``mass_recall``:
            softmax mass of the rows found over that of the k best. ``mass``: the same over that of all keys.
        """
        found = torch.cat(
            [
                torch.einsum("qkd,qd->qk", self.keys[part.clamp_min(0)].double(), asked.double())
                for part, asked in zip(
                    torch.split(rows, _QUERY_BLOCK), torch.split(self.queries, _QUERY_BLOCK), strict=True
                )
            ]
        ).masked_fill(rows < 0, float("-inf"))
        # Keys are scored in float32: what differs by its rounding is a tie.
        least = self.best[:, -1] - 1e-5 * self.best[:, -1].abs().clamp_min(1)
        mass = (self.scale * found).logsumexp(1)
        return {
            "recall": float((found >= least[:, None]).double().mean()),
            "mass_recall": float((mass - (self.scale * self.best).logsumexp(1)).exp().mean()),
            "mass": float((mass - self.everything).exp().mean()),
        }
