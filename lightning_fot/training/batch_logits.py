"""Logits of a training batch: those of the way of attending where it has its own, and of the crossbatch otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.model.attention.crossbatch import row_table
from lightning_fot.model.reading.inputs import check_ids

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig
    from lightning_fot.model.lm import MemoryLM
    from lightning_fot.model.passes.gather import RowGather


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
    way = lm.attachment.way
    if way.trains_texts:
        check_ids("input_ids", ids, lm.vocabulary)
        logits = way.batch_logits(lm.attachment, ids, config)
        return logits if wanted is None else logits[wanted][None]
    ranks, rank = (1, 0) if gather is None else (gather.world_size, gather.rank)
    table = row_table(config, ranks * len(ids), count)[rank * len(ids) : (rank + 1) * len(ids)]
    previous = batch.get("previous_ids"), batch.get("previous_valid")
    return lm.crossbatch(ids, table, *previous, config.differentiable, gather, wanted)
