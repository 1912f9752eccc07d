"""Rows of a training that reads quotes as one batch, in which each question also attends to what all rows tell."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from support.reading_rows import Row
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

KEPT = 2  # steps before, whose notes are more negatives


@dataclass
class Packed:
    """Rows as one batch.

    Args:
        ids: (R, L) int64.
        positions: (R, L) int64; questions that see the memory alone begin at 0, as they do when they are asked.
        local: (R, 1, L, L) bool, what each token sees of its row.
        told: (R, L) bool, whose pairs are the memory.
        asks: (R, L) bool, which tokens attend to the memory.
        answers: (R, L) bool.
    """

    ids: Tensor
    positions: Tensor
    local: Tensor
    told: Tensor
    asks: Tensor
    answers: Tensor


def packed(rows: list[Row], plain: Tensor | None = None, beside: bool = False) -> Packed:
    """Rows, and behind them windows of plain text, which are ``beside`` the memory or not."""
    longest = max(len(row.told) + sum(len(ids) for ids, _ in row.asked) for row in rows)
    count = len(rows) + (0 if plain is None else len(plain))
    longest = max(longest, 0 if plain is None else plain.shape[1])
    ids = torch.zeros(count, longest, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    told, asks, answers = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(3))
    local = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)
    for number, row in enumerate(rows):
        begin = len(row.told)
        ids[number, :begin] = torch.tensor(row.told)
        positions[number, :begin] = torch.arange(begin)
        local[number, :begin, :begin] = torch.ones(begin, begin, dtype=torch.bool).tril()
        # The first token of a window draws attention whatever it says: it is not stored (``skip_window_start``).
        told[number, 1:begin] = True
        asks[number, :begin] = row.quoted
        at, first = begin, begin if row.quoted else 0
        for asked, length in row.asked:
            end = at + len(asked)
            ids[number, at:end] = torch.tensor(asked)
            positions[number, at:end] = torch.arange(first, first + len(asked))
            local[number, at:end, :begin] = row.quoted
            local[number, at:end, at:end] = torch.ones(len(asked), len(asked), dtype=torch.bool).tril()
            answers[number, end - length : end] = True
            asks[number, at:end] = True
            at = end
    if plain is not None:
        length = plain.shape[1]
        ids[len(rows) :, :length] = plain
        positions[len(rows) :, :length] = torch.arange(length)
        local[len(rows) :, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
        asks[len(rows) :, :length] = beside
    return Packed(ids, positions, local[:, None], told, asks, answers)


class Crossbatch:
    """Memory layers in which tokens also attend to what all rows tell (FoT paper section 3.2), and some steps before.

    Keys of a memory stand at position 0, as ``positions: first`` has it.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        self.batch: Packed | None = None
        self.kept: deque[dict[int, tuple[Tensor, Tensor]]] = deque(maxlen=KEPT)
        self.shown: list[dict[int, tuple[Tensor, Tensor]]] = []
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self._rotary: Any = model.get_submodule("model.rotary_emb")
        ALL_ATTENTION_FUNCTIONS["crossbatch"] = self._attend
        for layer in layers:
            attention: Any = model.get_submodule(f"model.layers.{layer}.self_attn")
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation = "crossbatch"

    @contextmanager
    def during(self, batch: Packed, shown: int = 0) -> Iterator[None]:
        """Passes of this batch, beside the memory of so many steps before."""
        self.batch, self._fresh = batch, {}
        self.shown = list(self.kept)[len(self.kept) - min(shown, len(self.kept)) :]
        yield
        self.batch = None

    def keep(self) -> None:
        """Keeps the pairs of the last pass, for steps to come."""
        self.kept.append(self._fresh)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        batch = self.batch
        if batch is not None and mask is not None:
            cos, sin = (part[:, None].to(key.dtype) for part in self._rotary(key, batch.positions))
            turned_back = key * cos - rotate_half(key) * sin
            # (heads, pairs, size)
            keys = turned_back.transpose(0, 1)[:, batch.told]
            values = value.transpose(0, 1)[:, batch.told]
            self._fresh[module.layer_idx] = keys.detach(), values.detach()
            shown = [one[module.layer_idx] for one in self.shown]
            keys = torch.cat([keys, *(one for one, _ in shown)], 1)
            values = torch.cat([values, *(one for _, one in shown)], 1)
            rows = len(query)
            key = torch.cat([key, keys.expand(rows, -1, -1, -1)], 2)
            value = torch.cat([value, values.expand(rows, -1, -1, -1)], 2)
            beside = torch.zeros(batch.asks.shape, dtype=mask.dtype).masked_fill_(
                ~batch.asks, torch.finfo(mask.dtype).min
            )
            mask = torch.cat([mask, beside[:, None, :, None].expand(-1, 1, -1, keys.shape[1])], -1)
        out = functional.scaled_dot_product_attention(
            query, key, value.to(query.dtype), None if mask is None else mask.to(query.dtype), is_causal=mask is None,
            scale=given.get("scaling"), enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
