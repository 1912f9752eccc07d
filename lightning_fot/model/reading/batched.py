"""Reading long texts into a memory, in batches of windows where windows do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.memory.token_log import TokensRead
from lightning_fot.model.passes.crossbatch import CollectPass
from lightning_fot.model.reading.windows import read_windows

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.backbone.attachment import Attachment

# Tokens of a batch. A model of 4 layers and width 256 reads windows of 256 at 17,500 tokens/s one by one, at 19,900 in
# batches of 1,024, at 18,000 of 4,096 and at 15,000 of 16,384 (one core).
BATCH_TOKENS = 2048


def windows_are_independent(attached: Attachment) -> bool:
    """Whether what a window stores depends on that window alone.

    It does where the memory layer is the only one: nothing below it reads the memory. An overlap or sinks also bring
    earlier tokens in.
    """
    return len(attached.memory_layers) == 1 and not (attached.config.overlap or attached.config.sink_tokens)


@torch.no_grad()
def read(attached: Attachment, ids: Tensor, memory: Memory, advance: Callable[[int], None] | None = None) -> None:
    """Adds a text to a memory: the same pairs as ``MemoryLM.ingest`` stores, several windows at a time where possible.

    Args:
        attached: The model with its memory layers.
        ids: (n,) int64; the last window may be shorter.
        memory: Of one row, extended in place.
        advance: Called with the tokens of each step.

    Raises:
        SettingError: Its memory layers attend in place of having a memory.
    """
    attached.way.settings.check_memory("ingest")
    tell = advance or (lambda tokens: None)
    window = attached.config.window
    whole = len(ids) // window * window if windows_are_independent(attached) else 0
    step = max(1, BATCH_TOKENS // window) * window
    for start in range(0, whole, step):
        part = ids[start : min(start + step, whole)]
        _read_windows(attached, part.view(-1, window).to(attached.device), memory)
        tell(len(part))
    if whole < len(ids):
        rest = ids[None, whole:].to(attached.device)
        length = rest.shape[1]
        for _ in read_windows(attached, rest, memory, torch.tensor([length]), False, length, tell):
            pass


def _read_windows(attached: Attachment, windows: Tensor, memory: Memory) -> None:
    """Windows (n, T) as one step of n·T tokens."""
    layer = attached.memory_layers[-1]
    current = CollectPass(layer)
    with attached.during(current):
        attached.model(input_ids=windows, use_cache=False)
    skip = attached.config.skip_window_start

    def in_a_row(tensor: Tensor) -> Tensor:
        """(n, G, T, D) → (1, G, n·(T - skip), D)."""
        return tensor[:, :, skip:].transpose(0, 1).flatten(1, 2)[None]

    keys, values = current.pairs[layer]
    stored = torch.ones(windows.shape, dtype=torch.bool)
    stored[:, :skip] = False
    ids = windows.reshape(1, -1)
    read_now = TokensRead(ids, torch.ones(ids.shape, dtype=torch.bool), stored.view(1, -1))
    memory.append({layer: (in_a_row(keys), in_a_row(values))}, None, read_now)
