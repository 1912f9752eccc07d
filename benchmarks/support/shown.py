"""Crossbatch attention and training steps with d shown contexts: what they must cost, and rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.model.attention.crossbatch import crossbatch_attention
from lightning_fot.model.lm import MemoryLM
from lightning_fot.model.passes import crossbatch as passes
from lightning_fot.pretrained import load_backbone

Table = list[list[int]]
Attention = Callable[..., Tensor]
# Multiply-adds of attention's backward pass over those of its forward: scores again, and four products.
_BACKWARD = 2.5


@dataclass(frozen=True)
class Sizes:
    """What was asked for on the command line."""

    backbone: str
    layers: tuple[int, ...]
    window: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    repeats: int
    threads: int

    def as_row(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def concatenated_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    table: Table,
    *,
    scale: float,
    **_: Any,
) -> Tensor:
    """The rival: each row's shown keys and values joined to its local ones, then torch's attention, row by row."""
    length, outputs = query.shape[2], []
    local = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    for row, seen in enumerate(table):
        keys = torch.cat([*(far_key[n] for n in seen), key[row]], dim=1)[None]
        values = torch.cat([*(far_value[n] for n in seen), value[row]], dim=1)[None]
        mask = torch.cat([local.new_ones(length, keys.shape[2] - length), local], dim=1)
        part = query[row : row + 1]
        outputs.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outputs)


def concatenated_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor,
    far_value: Tensor,
    table: Table,
    *,
    scale: float,
    **_: Any,
) -> Tensor:
    """The same for all rows at once, as the released JAX code does it; every row sees as many windows."""
    length = query.shape[2]
    numbers = torch.tensor(table, device=query.device)
    # (B, d, G, T, D) → (B, G, d·T, D)
    joined = [
        torch.cat([far[numbers].transpose(1, 2).flatten(2, 3), near], dim=2)
        for far, near in ((far_key, key), (far_value, value))
    ]
    local = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = torch.cat([local.new_ones(length, joined[0].shape[2] - length), local], dim=1)
    return F.scaled_dot_product_attention(query, *joined, attn_mask=mask, scale=scale, enable_gqa=True)


METHODS: dict[str, Attention] = {
    "shared": crossbatch_attention,
    "concatenated rows": concatenated_rows,
    "concatenated batch": concatenated_batch,
}


class AttentionCase:
    """One layer's attention, forward and backward: rows i see windows i ... i+d-1, neighbours in memory."""

    def __init__(self, sizes: Sizes, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, sizes.dtype)

        def leaf(count: int, heads: int) -> Tensor:
            made = torch.randn(count, sizes.window, heads, sizes.head_dim, generator=generator)
            # As projections leave them.
            return made.to(sizes.device, dtype).transpose(1, 2).requires_grad_()

        rows = sizes.rows
        self.sizes, self.d = sizes, d
        self.tensors = [
            leaf(rows, sizes.heads),
            *(leaf(rows, sizes.kv_heads) for _ in range(2)),
            *(leaf(rows + d - 1, sizes.kv_heads) for _ in range(2)),
        ]
        self.grad = torch.randn_like(self.tensors[0])
        self.table = [list(range(row, row + d)) for row in range(rows)]

    def step(self, method: str) -> None:
        """Forward and backward; ``plain`` shows nothing."""
        self.clear()
        if method == "plain":
            out = crossbatch_attention(*self.tensors, [[]] * self.sizes.rows, scale=0.125)
        else:
            out = METHODS[method](*self.tensors, self.table, scale=0.125)
        out.backward(self.grad)

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        for tensor in self.tensors:
            tensor.grad = None

    def share(self) -> float:
        """Multiply-adds over those of plain causal attention."""
        length = self.sizes.window
        return 1 + self.d * length**2 / (length * (length + 1) / 2)


class StepCase:
    """A whole training step: d + 1 rows, each sees all others in the memory layers, whose blocks alone are trained.

    The future leaks from row to row: that costs nothing, and d contexts then need no more than d + 1 rows.
    """

    def __init__(self, sizes: Sizes, d: int, lm: MemoryLM | None = None) -> None:
        self.sizes, self.d = sizes, d
        self.lm = attached(sizes) if lm is None else lm
        self.rows = d + 1
        vocabulary = self.lm.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (self.rows, sizes.window), generator=generator).to(sizes.device)
        parameters = [parameter for parameter in self.lm.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step(self, method: str) -> None:
        """Forward, loss, backward and optimiser; ``plain`` shows nothing."""
        table = [[other for other in range(self.rows) if other != row] for row in range(self.rows)]
        if method == "plain":
            table = [[]] * self.rows
        self.clear()
        with using(METHODS.get(method, crossbatch_attention)):
            logits = self.lm.crossbatch(self.ids, table)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten()).backward()
        self.optimizer.step()

    def clear(self) -> None:
        """Drops the gradients of the step before."""
        self.optimizer.zero_grad()

    def share(self) -> float:
        """Multiply-adds over those of the plain step: products with weights, and attention."""
        model, length = self.lm.model, self.sizes.window
        first = self.lm.memory_layers[0]
        near = far = 0.0
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                layer = _layer_number(name)
                products = 1 + (layer is None or layer >= first) + module.weight.requires_grad
                near += products * 2 * module.weight.numel() * self.rows * length
        for index, fact in self.lm.attachment.facts.items():
            pair = 4 * fact.heads * fact.head_dim * (1 + _BACKWARD * (index >= first))
            near += pair * self.rows * length * (length + 1) / 2
            far += pair * self.rows * length * length * self.d * (index in self.lm.memory_layers)
        return 1 + far / near


def attached(sizes: Sizes) -> MemoryLM:
    """The backbone with memory layers, and all but their blocks frozen."""
    model = load_backbone(sizes.backbone, sizes.dtype).to(sizes.device).train()
    lm = attach_memory(model, MemoryConfig(memory_layers=list(sizes.layers), window=sizes.window))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_layer_number(name) in lm.memory_layers)
    return lm


def _layer_number(name: str) -> int | None:
    """The block that a module or parameter belongs to; None for the head and the embedding."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


@contextmanager
def using(attention: Attention) -> Iterator[None]:
    """Lets memory layers compute crossbatches with a rival."""
    before = passes.crossbatch_attention
    passes.crossbatch_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        passes.crossbatch_attention = before


def clocked(case: AttentionCase | StepCase, methods: Sequence[str]) -> dict[str, Callable[[], float]]:
    """Steps that measure themselves, by method."""

    def measure(method: str) -> float:
        began = time.perf_counter()
        case.step(method)
        if case.sizes.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return {method: (lambda method=method: measure(method)) for method in methods}  # type: ignore[misc]


def peak_bytes(case: AttentionCase | StepCase, method: str) -> int:
    """Bytes that a step holds at its highest above what was held before, as torch allocates them.

    Resident size would not do: what earlier steps gave back stays with the process, and hides what later ones take.
    """
    case.step(method)
    case.clear()
    if case.sizes.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.step(method)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        case.step(method)
    # Torch has no documented list of single allocations.
    events: Any = recorded.profiler
    changes = [
        (event.start_ns(), event.nbytes()) for event in events.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))
