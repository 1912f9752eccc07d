"""Checks token ids and masks; moves padding behind tokens, so that rows are cut into windows as each alone would be."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fot.errors import SettingError


def tokens_first(
    input_ids: Tensor, attention_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Moves padding behind the tokens of each row.

    Args:
        input_ids: (B, T), whole numbers.
        attention_mask: (B, T), 0 or False for padding anywhere; None means no padding.
        device: Where the ids are wanted.

    Returns:
        Ids (B, T) with each row's tokens first; tokens a row (B,) on the CPU; the column that each place came from
        (B, T), None where nothing moved.

    Raises:
        SettingError: Shape or dtype is wrong, or a row has no token.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise SettingError(
            "input_ids", tuple(input_ids.shape), "is not (rows, tokens)", "Give at least one token a row."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise SettingError("input_ids", str(input_ids.dtype), "is not a whole-number dtype", "Use torch.int64.")
    ids = input_ids.to(device)
    rows, length = ids.shape
    if attention_mask is None:
        return ids, torch.full((rows,), length), None
    if attention_mask.shape != input_ids.shape:
        raise SettingError(
            "attention_mask", tuple(attention_mask.shape), f"is not {tuple(input_ids.shape)}", "Give one value a token."
        )
    valid = attention_mask.to(device).bool()
    lengths = valid.sum(1).cpu()
    if bool(valid.all()):
        return ids, lengths, None
    if int(lengths.min()) == 0:
        raise SettingError("attention_mask", lengths.tolist(), "a row has no token", "Leave empty rows out.")
    places = torch.argsort((~valid).int(), dim=1, stable=True)
    return torch.gather(ids, 1, places), lengths, places


def beyond(lengths: Tensor, length: int, device: torch.device) -> Tensor:
    """(B, T) bool: places behind a row's last token."""
    return torch.arange(length, device=device) >= lengths.to(device)[:, None]
