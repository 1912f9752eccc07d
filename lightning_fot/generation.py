"""Continuing texts with transformers' ``generate``, the memory travelling in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn import functional as F

from lightning_fot.backbone import decoder_of
from lightning_fot.cache import MemoryCache
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_cached(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: MemoryCache, logits_to_keep: int = 0
) -> Tensor | None:
    """Reads (B, L) ids beside the local window of a cache.

    Args:
        model: The attached backbone.
        ids: At most ``cache.room`` tokens a row.
        mask: (B, seen + L), False or 0 for padding.
        cache: Extended by the tokens.
        logits_to_keep: Logits wanted, of the last tokens.

    Returns:
        (B, logits_to_keep, V); None for 0 or less.
    """
    if logits_to_keep <= 0:
        decoder_of(model)(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return None
    output = model(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep
    )
    logits: Tensor = output.logits
    return logits


def generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: MemoryCache, keep: bool, options: dict[str, Any]
) -> Tensor:
    """Reads prompts (B, T) into a fresh cache, all but their last token, and continues them.

    Args:
        model: The attached backbone.
        ids: Prompts, padding on the left.
        mask: (B, T), 0 for padding.
        cache: Its memory is attended to, and extended as the window moves.
        keep: Move prompt and continuation into the cache's memory at the end.
        options: Keyword arguments of transformers' ``generate``.

    Raises:
        SettingError: Padding on the right, or ``keep`` with several continuations of a prompt.
    """
    if not bool(mask[:, -1].all()):
        raise SettingError("attention_mask", "padding on the right", "leaves nothing to continue", "Pad on the left.")
    copies = max(int(options.get("num_beams") or 1), int(options.get("num_return_sequences") or 1))
    if keep and copies > 1:
        raise SettingError(
            "update_memory", True, "several continuations of one prompt cannot share its memory",
            "Generate with one beam and one sequence, or ingest the one you keep.",
        )  # fmt: skip
    while cache.seen < ids.shape[1] - 1:
        stop = min(ids.shape[1] - 1, cache.seen + cache.room)
        forward_cached(model, ids[:, cache.seen : stop], mask[:, :stop], cache)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    generated = cast(Any, model).generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
    if keep:
        # The last token was drawn but not read.
        sequences = generated if isinstance(generated, Tensor) else generated.sequences
        rest = sequences[:, cache.seen :]
        if rest.shape[1]:
            forward_cached(model, rest, F.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1), cache)
        cache.finish()
    result: Tensor = generated
    return result
