"""Crossbatch: which rows of a batch each row sees in its memory layers (FoT paper section 3.2, LongLLaMA's recipe)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.attention import causal_mask
from lightning_fot.config import CrossbatchConfig
from lightning_fot.errors import SettingError

RowTable = list[list[int]]


def packed_rows(batch_size: int, pack: int, context_range: int, stepping: bool) -> RowTable:
    """Rows that each row sees in the ``packed`` layout, nearest first.

    Rows p·j ... p·j+p-1 are consecutive windows of one stream. Row i sees the ``n_i - 1`` rows before it, with
    ``step = ceil((c+1) / max(p-1, 1))`` and ``n_i = min((i mod p)·step + 1, c+1, i+1)`` when stepping. Rows never wrap:
    with two memory layers the future would leak through the other layer.

    Args:
        batch_size: Rows.
        pack: ``p``.
        context_range: ``c``, the most rows that a row sees.
        stepping: Whether rows early in a pack see fewer.

    Example:
        >>> [len(rows) for rows in packed_rows(8, pack=4, context_range=3, stepping=True)]
        [0, 1, 2, 3, 0, 2, 3, 3]
    """
    step = -(-(context_range + 1) // max(pack - 1, 1))
    table = []
    for row in range(batch_size):
        seen = min((row % pack) * step + 1, context_range + 1) if stepping else context_range + 1
        table.append([row - back for back in range(1, min(seen, row + 1))])
    return table


def paper_rows(batch_size: int, d: int) -> RowTable:
    """Previous contexts that each row sees in the ``paper`` layout: its own, then those of the d-1 rows after it.

    Raises:
        SettingError: d is larger than the batch.

    Example:
        >>> paper_rows(3, 2)
        [[0, 1], [1, 2], [2, 0]]
    """
    if d > batch_size:
        raise SettingError(
            "model.crossbatch.d",
            d,
            f"is more than the {batch_size} rows of a batch",
            "Lower d or raise data.batch_size.",
        )
    return [[(row + other) % batch_size for other in range(d)] for row in range(batch_size)]


def row_table(config: CrossbatchConfig, batch_size: int) -> RowTable:
    """The table of a configuration; entries number rows of the batch (``packed``) or of C_prev (``paper``)."""
    if config.layout == "paper":
        return paper_rows(batch_size, config.d)
    return packed_rows(batch_size, config.pack, config.range, config.stepping)


def crossbatch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown_keys: Tensor,
    shown_values: Tensor,
    table: Sequence[Sequence[int]],
    *,
    scale: float,
    differentiable: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Each row attends to its causal local window and, in the same softmax, to whole windows of other rows.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, G, T, D), rotated.
        value: (B, G, T, D).
        shown_keys: (C, G, S, D), as if at position 0; C numbers what ``table`` names.
        shown_values: (C, G, S, D).
        table: For each of the B rows the numbers it sees.
        scale: Factor on inner products.
        differentiable: Let gradients reach shown keys and values (FoT). False detaches them (Memorizing Transformers).
        dropout: Share of attention weights set to 0.

    Returns:
        (B, H, T, D).
    """
    if not differentiable:
        shown_keys, shown_values = shown_keys.detach(), shown_values.detach()
    batch, heads, length, _ = query.shape
    grouped = heads != key.shape[1]
    local_mask = causal_mask(length, length, query.device)
    outputs = []
    for row in range(batch):
        seen = list(table[row])
        if not seen:
            outputs.append(
                F.scaled_dot_product_attention(
                    query[row : row + 1],
                    key[row : row + 1],
                    value[row : row + 1],
                    dropout_p=dropout,
                    is_causal=True,
                    scale=scale,
                    enable_gqa=grouped,
                )
            )
            continue
        far_keys = shown_keys[seen].transpose(0, 1).flatten(1, 2)  # (G, n·S, D)
        far_values = shown_values[seen].transpose(0, 1).flatten(1, 2)
        visible = torch.ones(length, far_keys.shape[1], dtype=torch.bool, device=query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[row : row + 1],
                torch.cat([far_keys.to(key.dtype), key[row]], dim=1)[None],
                torch.cat([far_values.to(value.dtype), value[row]], dim=1)[None],
                attn_mask=torch.cat([visible, local_mask], dim=1),
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs)
