"""Logits of a training batch, by whichever method the settings choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.crossbatch import row_table
from lightning_fot.dilated_pass import dilated_logits
from lightning_fot.previous_window import previous_window_logits

if TYPE_CHECKING:
    from lightning_fot.config import CrossbatchConfig
    from lightning_fot.distributed import RowGather
    from lightning_fot.lm import MemoryLM


def batch_logits(
    lm: MemoryLM,
    batch: dict[str, Tensor],
    config: CrossbatchConfig,
    count: int | None = None,
    gather: RowGather | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Logits with gradients.

    Args:
        lm: The attached model.
        batch: ``input_ids`` (B, T) int64; for the ``paper`` layout also ``previous_ids`` (B, w, T) and
            ``previous_valid`` (B, w).
        config: What rows see of each other.
        count: What a schedule says in place of ``d`` or ``range``; None takes those.
        gather: Shows the rows of all ranks; None those of this one.
        wanted: (B, T) bool: logits of these N tokens alone; None is all.

    Returns:
        (B, T, vocabulary), or (1, N, vocabulary).

    Raises:
        SettingError: The batch does not fit the settings.
    """
    ids = batch["input_ids"]
    dilated = bool(lm.config.segments)
    if dilated or config.layout == "previous_window":
        texts = ids.reshape(len(ids) // config.rows_of_a_text, -1)
        logits = dilated_logits(lm, texts) if dilated else previous_window_logits(lm, texts, config.differentiable)
        logits = logits.reshape(*ids.shape, -1)
        return logits if wanted is None else logits[wanted][None]
    ranks, rank = (1, 0) if gather is None else (gather.world_size, gather.rank)
    table = row_table(config, ranks * len(ids), count)[rank * len(ids) : (rank + 1) * len(ids)]
    previous = batch.get("previous_ids"), batch.get("previous_valid")
    return lm.crossbatch(ids, table, *previous, config.differentiable, gather, wanted)
