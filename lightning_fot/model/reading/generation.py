"""Continuing texts with transformers' ``generate``, the memory travelling in the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.layers import decoder_of
from lightning_fot.model.passes.base import StopForward
from lightning_fot.model.passes.local_window import MemoryCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from lightning_fot.config.memory import MemoryConfig

# Options of transformers' generate that cannot work here: what is wrong, what to do instead.
_REFUSED = {
    "inputs": ("is a second name for the prompt", "Give input_ids."),
    "inputs_embeds": ("is not known to the memory, which keeps token ids", "Give input_ids."),
    "past_key_values": ("is what the memory travels in", "Give memory=, made by ingest or update_memory=True."),
    "position_ids": ("is set by the local window", "Leave it out."),
    "cache_implementation": ("is the memory's own", "Leave it out."),
    "custom_generate": ("may call the model in ways that a moving window cannot follow", "Leave it out."),
    "assistant_model": ("takes tokens back that may have left the window", "Generate without assistance."),
    "prompt_lookup_num_tokens": ("takes tokens back that may have left the window", "Generate without assistance."),
    "assistant_early_exit": ("takes tokens back that may have left the window", "Generate without assistance."),
    "use_mtp": ("takes tokens back that may have left the window", "Generate without assistance."),
    "token_healing": ("generates the end of the prompt anew, without the memory", "Leave it out."),
    "output_hidden_states": (
        "would lack those of the prompt, which is read window by window",
        "Ask the model itself: lm.model(ids, output_hidden_states=True).",
    ),
    "output_attentions": ("needs weights that memory layers do not give", "Use record_attention."),
    "penalty_alpha": ("(contrastive search) is not part of transformers 5", "Sample, or search with beams."),
    "dola_layers": ("(DoLa) is not part of transformers 5", "Sample, or search with beams."),
    "constraints": ("(constrained beams) is not part of transformers 5", "Use prefix_allowed_tokens_fn."),
    "force_words_ids": ("(constrained beams) is not part of transformers 5", "Use prefix_allowed_tokens_fn."),
}
# First tokens that stay local where the configuration says nothing; StreamingLLM (arXiv 2309.17453) found 4 enough.
DEFAULT_SINKS = 4
# Behind the end of a row, where the model names no token for it.
PADDING = 0
_ENDS_ALL_ROWS = (MaxLengthCriteria, MaxTimeCriteria)


def while_generating(config: MemoryConfig) -> MemoryConfig:
    """How the local window moves while a text is continued.

    A configuration with an overlap is taken as it is. Without one the window would move as a whole, as in LongLLaMA,
    and layers without a memory would suddenly see a single token; so half of it stays. The first tokens stay as well:
    most models park attention on them, and without them predict worse until the end of the stride
    (``benchmarks/window_strides.py``).

    Args:
        config: As given to ``attach_memory``.

    Returns:
        The same with ``overlap`` and ``sink_tokens`` above 0, as far as the window has room for them.

    Example:
        >>> from lightning_fot import MemoryConfig
        >>> chosen = while_generating(MemoryConfig(window=512))
        >>> chosen.overlap, chosen.sink_tokens
        (254, 4)
    """
    if config.overlap:
        return config
    sinks = config.sink_tokens or min(DEFAULT_SINKS, config.window // 4)
    return replace(config, sink_tokens=sinks, overlap=(config.window - sinks) // 2)


def forward_cached(model: PreTrainedModel, ids: Tensor, cache: Cache, logits_to_keep: int = 0) -> Tensor | None:
    """Reads (B, L) ids beside the local window of a cache.

    Args:
        model: The attached backbone.
        ids: For a ``MemoryCache`` at most ``cache.room`` tokens a row; what lies behind ``cache.ends`` is padding.
        cache: Extended by the tokens; a ``MemoryCache``, or a KV cache of transformers.
        logits_to_keep: Logits wanted, of the last columns.

    Returns:
        (B, logits_to_keep, V); None for 0 or less, and nothing above ``cache.stop_layer`` is computed.
    """
    if logits_to_keep <= 0:
        with suppress(StopForward):  # above its last memory layer a text that is only read needs nothing
            decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
        return None
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep)
    logits: Tensor = output.logits
    return logits


def read_cached(model: PreTrainedModel, ids: Tensor, lengths: Tensor, cache: MemoryCache) -> None:
    """Reads the first ``lengths`` (B,) tokens of each row of (B, L) ids into a fresh cache."""
    cache.seen, cache.ends = 0, lengths
    longest = int(lengths.max())
    while cache.seen < longest:
        stop = min(longest, cache.seen + cache.room)
        forward_cached(model, ids[:, cache.seen : stop], cache)
        check_progress(cache, stop)


def check_progress(cache: MemoryCache, stop: int) -> None:
    """Refuses to read the same tokens for ever, or twice.

    Raises:
        RuntimeError: A forward up to column ``stop`` has not reached the cache.
    """
    if cache.seen != stop:
        raise RuntimeError(
            f"the cache has {cache.seen} columns after a forward that ends at column {stop}: "
            "the decoder that the cache was given to is not the one that memory layers know"
        )


def check_options(model: PreTrainedModel, options: dict[str, Any], keep: bool) -> None:
    """Refuses options of transformers' ``generate`` that cannot work beside a memory.

    Args:
        model: The attached backbone, whose own ``generation_config`` counts too.
        options: Keyword arguments of ``generate``.
        keep: Whether the continuation is to be kept in the memory.

    Raises:
        SettingError: Names the option.
    """
    for name, (problem, fix) in _REFUSED.items():
        value = _option(model, options, name)
        # A number of 0 and False turn an option off.
        if value is not None and (not isinstance(value, int | float) or value):
            shown = value if isinstance(value, str | int | float | list | tuple) else type(value).__name__
            if name not in options:
                # It is the model's own, or that of a generation_config that was given: there is nothing to leave out.
                problem, fix = f"of the generation_config {problem}", "Set it to None there."
            raise SettingError(name, shown, problem, fix)
    if options.get("use_cache") is False:
        raise SettingError("use_cache", False, "would read without the memory", "Leave it out.")
    groups = _option(model, options, "num_beam_groups")
    if groups is not None and groups > 1:
        raise SettingError(
            "num_beam_groups", groups, "(group beam search) is not part of transformers 5", "Use num_beams."
        )
    for name in ("num_beams", "num_return_sequences"):
        copies = _option(model, options, name)
        if keep and copies is not None and copies > 1:
            raise SettingError(
                "update_memory", True, f"cannot keep several continuations of one prompt ({name}={copies})",
                "Generate with one beam and one sequence, or ingest the one you keep.",
            )  # fmt: skip


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    read_prompt: Callable[[], None],
    cache: MemoryCache,
    keep: bool,
    options: dict[str, Any],
) -> Any:
    """Continues prompts (B, T).

    Args:
        model: The attached backbone.
        ids: Prompts, each ending in the last column.
        read_prompt: Reads all but the last token of each prompt into the cache. Called when transformers asks for the
            first logits, so that its own checks of the options come before any work.
        cache: Fresh; its memory is attended to, and extended as the window moves.
        keep: Move prompt and continuation into the cache's memory at the end.
        options: Keyword arguments of transformers' ``generate``, checked.

    Returns:
        What transformers gives: (B, T + new) ids, or its output object.
    """
    length = ids.shape[1]
    # Models that were trained with gradient checkpointing are often saved without; the memory travels in the cache.
    options = {"use_cache": True, **options}

    def read(rows: int) -> None:
        read_prompt()
        if cache.recorder is not None:
            cache.recorder.answering(True)
        cache.seen, cache.ends = length - 1, None
        cache.batch_repeat_interleave(rows // len(ids))

    cache.before_first = read
    # Transformers asks for what follows the tokens that the cache has seen.
    cache.seen = length - 1
    if (_option(model, options, "num_beams") or 1) == 1:
        options = {**options, "stopping_criteria": _watched(model, options, cache)}
        if all(_option(model, options, name) is None for name in ("pad_token_id", "eos_token_id")):
            options = {**options, "pad_token_id": PADDING}
    # The cache knows where padding is; with a mask of ones transformers makes no masks of its own.
    generated = cast(Any, model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options
    )
    if keep:
        # The last token was drawn but not read.
        sequences = generated if isinstance(generated, Tensor) else generated.sequences
        rest = sequences[:, cache.seen :]
        if rest.shape[1]:
            forward_cached(model, rest, cache)
        cache.finish()
    if cache.recorder is not None:
        cache.recorder.answering(False)
    return generated


class RowEnds(StoppingCriteria):
    """Tells a cache where rows end that end before others, so that the padding behind is not taken for text.

    Rows get padding behind their end whichever criterion has ended them. Transformers gives it where a criterion names
    end tokens, and would else draw on from what the cache has put away.

    Args:
        cache: The cache of the search.
        criteria: What may end a row.
    """

    eos_token_id: Tensor | None = None
    """Named for transformers, which asks whether a criterion has it; ``criteria`` know their own."""

    def __init__(self, cache: MemoryCache, criteria: list[StoppingCriteria]) -> None:
        self.cache = cache
        self.criteria = criteria

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows (B,) bool end with the last of their ids (B, T)."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | criterion(input_ids, scores, **kwargs)
        ended = done.cpu()
        cache, length = self.cache, input_ids.shape[1]
        if cache.ends is None and bool(ended.any()):
            cache.ends = torch.full((len(input_ids),), torch.iinfo(torch.int64).max)
        if cache.ends is not None:
            # Rows that ended a step ago have had their last token read: they need no local window any more.
            read = (cache.ends <= cache.seen) & (torch.tensor(cache.widths) > 0)
            if bool(read.any()):
                cache.finish(read)
            cache.ends = torch.where(ended, cache.ends.clamp_max(length), cache.ends)
        return done


def _watched(model: PreTrainedModel, options: dict[str, Any], cache: MemoryCache) -> list[StoppingCriteria]:
    """The user's stopping criteria in such a form that the cache learns which row ends where."""
    given = list(options.get("stopping_criteria") or [])
    own: list[StoppingCriteria] = [criterion for criterion in given if not isinstance(criterion, _ENDS_ALL_ROWS)]
    eos, strings = _option(model, options, "eos_token_id"), _option(model, options, "stop_strings")
    if eos is not None and not any(isinstance(criterion, EosTokenCriteria) for criterion in own):
        own.append(EosTokenCriteria(torch.as_tensor(eos, device=model.device).flatten()))
    if strings is not None and options.get("tokenizer") is not None:
        own.append(StopStringCriteria(options["tokenizer"], strings))
    if not own:
        return given
    # Transformers lets a criterion of its own kind take the place of the one it would make: those are passed on.
    passed = [c for c in given if isinstance(c, (*_ENDS_ALL_ROWS, EosTokenCriteria, StopStringCriteria))]
    return [*passed, RowEnds(cache, own)]


def _option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """The value that transformers will use: the argument, else that of ``generation_config``, else the model's own."""
    if name in options:
        return options[name]
    for config in (options.get("generation_config"), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
