"""Crossbatch: which rows of a batch each row sees in its memory layers (FoT paper section 3.2, LongLLaMA's recipe)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fot.config.crossbatch import CrossbatchConfig
from lightning_fot.errors import SettingError
from lightning_fot.memory.found import Shown
from lightning_fot.memory.partial import in_one_dtype
from lightning_fot.model.attention.shared_windows import attend_shared, runs_of
from lightning_fot.model.attention.softmax import attend

RowTable = list[list[int]]


def packed_rows(batch_size: int, pack: int, context_range: int, stepping: bool) -> RowTable:
    """Rows that each row sees in the ``packed`` layout, nearest first.

    Rows p·j ... p·j+p-1 are consecutive windows of one stream. Row i sees the ``n_i - 1`` rows before it, with
    ``step = ceil((c+1) / max(p-1, 1))`` and ``n_i = min((i mod p)·step + 1, c+1, i+1)`` when stepping, else
    ``min(c+1, i+1)``. Rows never wrap: with two memory layers the future would leak through the other layer.

    Args:
        batch_size: Rows.
        pack: ``p``.
        context_range: ``c``, the most rows that a row sees.
        stepping: Whether rows early in a pack see fewer; packs of one row have no early rows.

    Example:
        >>> [len(rows) for rows in packed_rows(8, pack=4, context_range=3, stepping=True)]
        [0, 1, 2, 3, 0, 2, 3, 3]
    """
    step = -(-(context_range + 1) // max(pack - 1, 1))
    table = []
    for row in range(batch_size):
        early = stepping and pack > 1
        seen = min((row % pack) * step + 1, context_range + 1) if early else context_range + 1
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


def row_table(config: CrossbatchConfig, batch_size: int, count: int | None = None) -> RowTable:
    """The table of a configuration; entries number rows of the batch (``packed``) or of C_prev (``paper``).

    Args:
        config: Layout and counts.
        batch_size: Rows.
        count: What a schedule says in place of ``d`` or ``range``; None takes those.

    Raises:
        SettingError: The most that the schedule ever asks for is more than the batch has: said at the first step, not
            when it is reached.
    """
    if config.layout == "paper":
        table = paper_rows(batch_size, config.most)
        return [seen[: config.d if count is None else count] for seen in table]
    return packed_rows(batch_size, config.pack, config.range if count is None else count, config.stepping)


def crossbatch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown_keys: Tensor,
    shown_values: Tensor,
    table: Sequence[Sequence[int]],
    *,
    scale: float,
    far_query: Tensor | None = None,
    differentiable: bool = True,
    dropout: float = 0.0,
    softcap: float | None = None,
    gate: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each row attends to its causal local window and, in the same softmax, to whole windows of other rows.

    Windows are shared, not copied for each row that sees them, and no scores are kept for the backward pass: see
    ``shared_windows``. Dropout, soft-capped scores and gates are what fused kernels cannot do; with them, and with
    queries that ask shown windows in another form, scores are explicit, row by row.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, G, T, D), rotated.
        value: (B, G, T, D).
        shown_keys: (C, G, S, D), as if at position 0; C numbers what ``table`` names. Neither they nor the values are
            copied if a window's tokens, and the windows, follow each other in memory as projections leave them.
        shown_values: (C, G, S, D).
        table: For each of the B rows the numbers it sees.
        scale: Factor on inner products.
        far_query: (B, H, T, D), the queries as they ask shown windows; None asks with ``query``.
        differentiable: Let gradients reach shown keys and values (FoT). False detaches them (Memorizing Transformers).
        dropout: Share of attention weights set to 0.
        softcap: ``c`` of ``c · tanh(score / c)`` (Gemma 2), or None.
        gate: (H,) logits of the shown windows' share (Memorizing Transformers); None is one softmax.
        sinks: (H,) scores of one more column of each softmax, without a value (gpt-oss); None has none.

    Returns:
        (B, H, T, D).
    """
    if not differentiable:
        shown_keys, shown_values = shown_keys.detach(), shown_values.detach()
    query, key, value, shown_keys, shown_values = in_one_dtype(query, key, value, shown_keys, shown_values)
    # (C, G, S, D) → (G, C·S, D)
    far_key, far_value = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (shown_keys, shown_values))
    runs = [runs_of(seen, shown_keys.shape[2]) for seen in table]
    far_query = query if far_query is None else far_query.to(query.dtype)
    if dropout == 0 and softcap is None and gate is None and sinks is None and far_query is query:
        if not any(runs):
            return attend(query, key, value, scale=scale)
        return attend_shared(query, key, value, far_key, far_value, runs, scale)
    outputs = []
    for row, seen in enumerate(runs):
        part = slice(row, row + 1)
        shown = Shown(_joined(far_key, seen)[None], _joined(far_value, seen)[None]) if seen else None
        outputs.append(
            attend(
                query[part],
                key[part],
                value[part],
                shown,
                far_query=far_query[part],
                scale=scale,
                softcap=softcap,
                gate=gate,
                dropout=dropout,
                sinks=sinks,
            )
        )
    return torch.cat(outputs)


def _joined(shared: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Runs of (G, M, D) in one tensor: a view where there is one run."""
    parts = [shared[:, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
