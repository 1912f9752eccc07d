"""Keys, values and queries to fill memories with: recorded from real text, and stretched to any length.

Indexes behave differently on random vectors, so nothing here is drawn from a normal distribution. A pair beyond the
recorded ones is a recorded pair, drawn by chance, moved by a share of the difference of two other keys of its k-means
cell, and scaled back around the cell's centre: cells keep their means and covariances, and no key comes twice.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.evaluation.measures.retrieval import Capture
from lightning_fot.model.lm import MemoryLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 8192
_KEYS_A_CELL = 64


def library_ids(tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """(1, count) tokens of the standard library's sources, in the order of their names."""
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += tokenizer(file.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return torch.tensor(ids[:count])[None]
    raise ValueError(f"the standard library gives {len(ids)} tokens, not {count}")


class Pairs:
    """Recorded pairs of one text by layer, and an endless stretch of them.

    Args:
        keys: (G, N, D) by layer.
        values: (G, N, D) by layer.
        queries: (G, n, D) by layer, such as an index learns from.
        share: Noise of a stretched key, as a share of the spread within its cell.
        seed: For all that is drawn.
    """

    def __init__(
        self,
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
        queries: dict[int, Tensor],
        share: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.keys, self.values, self.queries = keys, values, queries
        self.share = share
        self.seed = seed
        self.recorded = next(iter(keys.values())).shape[1]
        self._cells: dict[int, list[_Cells]] = {}

    @classmethod
    def record(cls, lm: MemoryLM, ids: Tensor, share: float) -> Pairs:
        """Reads (1, T) ids with an attached model and takes what it stores."""
        capture, memory = Capture(lm), lm.new_memory(retriever="exact")
        capture.ingest(ids, memory, lambda tokens: None)
        return cls(
            {number: layer.keys[0].float().clone() for number, layer in memory.layers.items()},
            {number: layer.values[0].float().clone() for number, layer in memory.layers.items()},
            {number: torch.cat(parts, dim=1) for number, parts in capture.past.items()},
            share,
        )

    @classmethod
    def load(cls, file: Path, share: float) -> Pairs:
        """Reads what :meth:`save` wrote: ``keys.<layer>``, ``values.<layer>`` (G, N, D), ``queries.<layer>``."""
        if file.suffix == ".npz":
            import numpy as np

            with np.load(file, allow_pickle=False) as archive:
                tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            from safetensors.torch import load_file

            # Cloned: pages of a mapped file would count as memory that is in use.
            tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        kinds = [
            {int(name.partition(".")[2]): value.float() for name, value in tensors.items() if name.startswith(kind)}
            for kind in ("keys.", "values.", "queries.")
        ]
        return cls(kinds[0], kinds[1], kinds[2], share)

    def save(self, file: Path) -> None:
        """Writes the recorded pairs as safetensors."""
        from safetensors.torch import save_file

        kinds = (("keys", self.keys), ("values", self.values), ("queries", self.queries))
        save_file({f"{kind}.{n}": part.contiguous() for kind, parts in kinds for n, part in parts.items()}, file)

    def blocks(self, start: int, stop: int) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Pairs ``start`` to ``stop`` by layer, each (1, G, n, D), in parts of at most ``BLOCK``."""
        for number in range(start // BLOCK, math.ceil(stop / BLOCK)):
            first, last = max(start, number * BLOCK), min(stop, (number + 1) * BLOCK)
            block = {layer: self._block(layer, number) for layer in self.keys}
            part = slice(first - number * BLOCK, last - number * BLOCK)
            yield {layer: (keys[None, :, part], values[None, :, part]) for layer, (keys, values) in block.items()}

    def _block(self, layer: int, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (G, BLOCK, D) of one block: recorded as far as that goes."""
        begin = number * BLOCK
        real = max(0, min(self.recorded - begin, BLOCK))
        keys, values = self.keys[layer][:, begin : begin + real], self.values[layer][:, begin : begin + real]
        if real == BLOCK:
            return keys, values
        if layer not in self._cells:
            self._cells[layer] = [_Cells(bank, self.seed) for bank in self.keys[layer]]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * layer + number)
        drawn = torch.randint(0, self.recorded, (BLOCK - real,), generator=generator)
        stretched = torch.stack([cells.stretch(drawn, self.share, generator) for cells in self._cells[layer]])
        return torch.cat([keys, stretched], dim=1), torch.cat([values, self.values[layer][:, drawn]], dim=1)


class _Cells:
    """k-means cells of the recorded keys (N, D) of one bank."""

    def __init__(self, keys: Tensor, seed: int, iterations: int = 8) -> None:
        self.keys = keys
        count = max(1, len(keys) // _KEYS_A_CELL)
        generator = torch.Generator().manual_seed(seed)
        self.centres = keys[torch.randperm(len(keys), generator=generator)[:count]].clone()
        for _ in range(iterations):
            self._assign()
            sizes = torch.bincount(self.cell, minlength=count)
            sums = torch.zeros_like(self.centres).index_add_(0, self.cell, keys)
            self.centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), self.centres)
        self._assign()
        self.sizes = torch.bincount(self.cell, minlength=count)
        self.members = self.cell.argsort(stable=True)
        self.first = self.sizes.cumsum(0) - self.sizes

    def _assign(self) -> None:
        # In blocks: scores of 100k keys and their cells at once would be a gigabyte.
        half = self.centres.square().sum(1) / 2
        self.cell = torch.cat([(part @ self.centres.T - half).argmax(1) for part in torch.split(self.keys, BLOCK)])

    def stretch(self, drawn: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """New keys (n, D) near the recorded rows ``drawn`` (n,)."""
        cell = self.cell[drawn]
        pair = []
        for _ in range(2):
            place = (torch.rand(len(drawn), generator=generator) * self.sizes[cell]).long()
            pair.append(self.keys[self.members[self.first[cell] + place.clamp_max(self.sizes[cell] - 1)]])
        centre = self.centres[cell]
        # The difference of two members has twice the covariance of the cell.
        moved = self.keys[drawn] - centre + share * (pair[0] - pair[1]) / math.sqrt(2)
        return centre + moved / math.sqrt(1 + share**2)
