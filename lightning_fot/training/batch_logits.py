"""Logits of a training batch, by whichever method the settings choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_fot.config.combinations import check_segments_of_window
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.crossbatch import row_table
from lightning_fot.model.passes.dilated import DilatedPass, patterns_of
from lightning_fot.model.passes.previous_window import PreviousWindowPass
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
) -> Tensor:
    """Logits with gradients.

    Args:
        lm: The attached model.
        batch: ``input_ids`` (B, T) int64; for the ``paper`` layout also ``previous_ids`` (B, w, T) and
            ``previous_valid`` (B, w).
        config: What rows see of each other.
        count: What a schedule says in place of ``d`` or ``range``; None takes those.
        gather: Shows the rows of all ranks; None those of this one.

    Returns:
        (B, T, vocabulary).

    Raises:
        SettingError: The batch does not fit the settings.
    """
    ids = batch["input_ids"]
    dilated = bool(lm.config.segments)
    if dilated or config.layout == "previous_window":
        texts = ids.reshape(len(ids) // config.rows_of_a_text, -1)
        logits = dilated_logits(lm, texts) if dilated else previous_window_logits(lm, texts, config.differentiable)
        return logits.reshape(*ids.shape, -1)
    ranks, rank = (1, 0) if gather is None else (gather.world_size, gather.rank)
    table = row_table(config, ranks * len(ids), count)[rank * len(ids) : (rank + 1) * len(ids)]
    previous = batch.get("previous_ids"), batch.get("previous_valid")
    return lm.crossbatch(ids, table, *previous, config.differentiable, gather)


def dilated_logits(lm: MemoryLM, input_ids: Tensor) -> Tensor:
    """Logits of whole texts, with gradients.

    Args:
        lm: The attached model; window, segments and dilations are those of its settings.
        input_ids: (N, T) int64, T a multiple of the window.

    Returns:
        (N, T, vocabulary).

    Raises:
        SettingError: Settings or ids do not fit.
    """
    check_ids("input_ids", input_ids, lm.vocabulary)
    texts, length = input_ids.shape
    window = lm.config.window
    if length % window:
        raise SettingError("input_ids", (texts, length), f"are no whole windows of {window}", "Give whole ones.")
    current = DilatedPass(patterns_of(lm.config), window, length // window, texts, lm.device)
    with lm.attachment.during(current):
        logits: Tensor = lm.model(input_ids=input_ids.reshape(-1, window), use_cache=False).logits
    return logits.reshape(texts, length, -1)


def previous_window_logits(lm: MemoryLM, input_ids: Tensor, differentiable: bool = False) -> Tensor:
    """Logits of whole texts in which every layer sees the window before, with gradients.

    Args:
        lm: The attached model, without memory layers; window and overlap are those of its settings.
        input_ids: (N, T) int64, T a multiple of window - overlap. The first segment of a text has none before it.
        differentiable: Let gradients reach keys and values of earlier segments. The paper's models do not.

    Returns:
        (N, T, vocabulary).

    Raises:
        SettingError: Settings or ids do not fit.
    """
    check_segments_of_window(lm.config)
    check_ids("input_ids", input_ids, lm.vocabulary)
    window, segment = lm.config.window, lm.config.window - lm.config.overlap
    texts, length = input_ids.shape
    if length % segment:
        raise SettingError("input_ids", (texts, length), f"are no whole segments of {segment}", "Give whole ones.")
    current = PreviousWindowPass(length // segment, segment, window, differentiable, lm.device)
    with lm.attachment.during(current):
        logits: Tensor = lm.model(input_ids=input_ids.reshape(-1, segment), use_cache=False).logits
    return logits.reshape(texts, length, -1)
