"""Checks what a call is given; moves padding behind tokens, so that a row is cut as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.config.data import IGNORED
from lightning_fot.errors import SettingError
from lightning_fot.memory.memory import Memory
from lightning_fot.memory.place import MemoryShape

if TYPE_CHECKING:
    from lightning_fot.model.backbone.fingerprint import Maker

_WHOLE = (torch.int64, torch.int32)


def tokens_first(
    input_ids: Tensor, attention_mask: Tensor | None, device: torch.device, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Moves padding behind the tokens of each row.

    Args:
        input_ids: (B, T), whole numbers below ``vocabulary``.
        attention_mask: (B, T), 0 or False for padding anywhere; None means no padding.
        device: Where the ids are wanted.
        vocabulary: Tokens that the backbone knows.

    Returns:
        Ids (B, T) with each row's tokens first; tokens a row (B,) on the CPU; the column that each place came from
        (B, T), None where nothing moved.

    Raises:
        SettingError: Shape, dtype or values are wrong, or a row has no token.
    """
    check_ids("input_ids", input_ids, vocabulary)
    ids = input_ids.to(device)
    rows, length = ids.shape
    if attention_mask is None:
        return ids, torch.full((rows,), length), None
    valid = _checked_mask(attention_mask, input_ids).to(device)
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


def check_ids(name: str, ids: Tensor, vocabulary: int, dims: int = 2) -> None:
    """Refuses what are not ids (B, ..., T) below ``vocabulary``.

    Raises:
        SettingError: It is no tensor, empty, of another shape or dtype, or names a token that does not exist.
    """
    if not isinstance(ids, Tensor):
        raise SettingError(name, type(ids).__name__, "is not a tensor", "Give torch.tensor(...) of (rows, tokens).")
    if ids.ndim != dims or ids.numel() == 0:
        shape = "(rows, tokens)" if dims == 2 else "(rows, windows, tokens)"
        raise SettingError(name, tuple(ids.shape), f"is not {shape}", "Give at least one token a row.")
    if ids.dtype not in _WHOLE:
        raise SettingError(name, str(ids.dtype), "is not a whole-number dtype", "Use torch.int64.")
    _check_range(name, ids, vocabulary)


def _check_range(name: str, ids: Tensor, vocabulary: int) -> None:
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise SettingError(
            name,
            low if low < 0 else high,
            f"is outside the backbone's vocabulary of {vocabulary} tokens",
            f"Use the tokenizer of this backbone; ids go from 0 to {vocabulary - 1}, those of padding too.",
        )


def _checked_mask(mask: Tensor, input_ids: Tensor) -> Tensor:
    """(B, T) bool."""
    if not isinstance(mask, Tensor):
        raise SettingError("attention_mask", type(mask).__name__, "is not a tensor", "Give one value a token.")
    if mask.shape != input_ids.shape:
        raise SettingError(
            "attention_mask", tuple(mask.shape), f"is not {tuple(input_ids.shape)}", "Give one value a token."
        )
    valid = mask != 0
    if not bool((valid == mask).all()):
        wrong = mask[valid & (mask != 1)][0].item()
        raise SettingError(
            "attention_mask", wrong, "is neither 0 nor 1", "Give 1 for a token and 0 for padding; nothing is added."
        )
    return valid


def checked_labels(labels: Tensor, input_ids: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    """Labels (B, T) int64 on ``device``.

    Raises:
        SettingError: Shape or dtype is wrong, or one is neither a token nor -100.
    """
    if not isinstance(labels, Tensor):
        raise SettingError("labels", type(labels).__name__, "is not a tensor", "Give one a token.")
    if labels.shape != input_ids.shape:
        raise SettingError("labels", tuple(labels.shape), f"is not {tuple(input_ids.shape)}", "Give one a token.")
    if labels.dtype not in _WHOLE:
        raise SettingError("labels", str(labels.dtype), "is not a whole-number dtype", "Use torch.int64.")
    low, high = (int(value) for value in labels.masked_fill(labels == IGNORED, 0).aminmax())
    if low < 0 or high >= vocabulary:
        raise SettingError(
            "labels",
            low if low < 0 else high,
            f"is outside the backbone's vocabulary of {vocabulary} tokens",
            f"Use ids from 0 to {vocabulary - 1}, and {IGNORED} where there is no target.",
        )
    return labels.to(device, torch.int64)


def check_switch(name: str, value: object) -> None:
    """Refuses what is neither True nor False.

    Raises:
        SettingError: It is something else.
    """
    if not isinstance(value, bool):
        raise SettingError(name, value, "is neither True nor False", "Choose one.")


def check_count(name: str, value: object) -> None:
    """Refuses what is not a whole number of at least 0.

    Raises:
        SettingError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingError(name, value, "must be a whole number of at least 0", "0 gives those of all tokens.")


def check_memory(memory: Memory, rows: int, shape: MemoryShape, maker: Maker) -> None:
    """Refuses a memory that another model made, or other weights of the same, or one of other rows.

    Args:
        memory: What is to be attended to.
        rows: B of the input.
        shape: What the model's own memories have.
        maker: The model that reads, as it is now; compared where another made the memory.

    Raises:
        SettingError: It does not fit.
    """
    if not isinstance(memory, Memory):
        raise SettingError(
            "memory",
            type(memory).__name__,
            "is not a memory",
            "Make one with new_memory, or read a folder with load_memory.",
        )
    if memory.batch_size != rows:
        raise SettingError(
            "memory",
            f"{memory.batch_size} rows",
            f"does not fit input of {rows} rows",
            "Make it with new_memory(batch_size=...).",
        )
    pairs = ((field.name, getattr(memory.shape, field.name), getattr(shape, field.name)) for field in fields(shape))
    different = {name: (its, own) for name, its, own in pairs if its != own}
    if not different and memory.fingerprint is not maker:
        if not len(memory):
            # Whoever fills it makes it.
            memory.fingerprint = maker
        elif memory.fingerprint is not None:
            its_print, own_print = memory.fingerprint(), maker()
            different = {
                name: (its_print.get(name), own) for name, own in own_print.items() if its_print.get(name) != own
            }
            if not different:
                # The same model as another attachment, or as it was once before: known from now on.
                memory.fingerprint = maker
            elif getattr(memory.fingerprint, "identity", None) is maker.identity:
                # A call may score otherwise than the model that it asks.
                different.pop("score_factor", None)
    if different:
        listed = "; ".join(f"{name}: {_short(its)} there, {_short(own)} here" for name, (its, own) in different.items())
        raise SettingError(
            "memory",
            f"tokens={memory.lengths.tolist()}",
            f"does not fit this model ({listed})",
            "Read the text again, or use the weights, adapters and settings that made it.",
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def check_table(table: Sequence[Sequence[int]], rows: int, shown: int) -> None:
    """Refuses a table that is not one list of row numbers a row.

    Args:
        table: For each row what it sees.
        rows: B.
        shown: Rows that can be seen.

    Raises:
        SettingError: It has another length, or names a row that is not there.
    """
    if len(table) != rows:
        raise SettingError("table", len(table), f"is not the batch's {rows} rows", "Give one list a row.")
    for seen in table:
        for number in seen:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < shown:
                raise SettingError("table", number, f"is not a row from 0 to {shown - 1}", "Correct it.")
