"""What an evaluation harness asks of a model: scores of continuations. Knows nothing of the harness itself.

A prompt is read as ``generate`` reads it, so that a text the model would generate is a text that it scores best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_fot.config.data import IGNORED
from lightning_fot.errors import SettingError
from lightning_fot.model.passes.local_window import MemoryCache
from lightning_fot.model.reading.generation import forward_cached, read_cached, while_generating

if TYPE_CHECKING:
    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.model.lm import MemoryLM

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Item = TypeVar("Item")

# Names by which tasks say how many tokens may be generated, the strongest first.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Args:
        logprob: Sum of the log-probabilities of its tokens, in nats.
        greedy: Whether each of them is the likeliest one.
    """

    logprob: float
    greedy: bool


def plain_tokens(config: MemoryConfig) -> int:
    """Tokens up to which an attached model with an empty memory is its plain backbone; 0 where it never is."""
    return config.way.plain_tokens(config.window) if config.positions != "none" else 0


def new_tokens(options: Mapping[str, Any], default: int) -> int:
    """The most tokens that a request lets be generated.

    Example:
        >>> new_tokens({"until": ["."], "max_new_tokens": 8}, default=256)
        8
    """
    return int(next((options[name] for name in _LENGTHS if options.get(name) is not None), default))


def answer_apart(
    requests: Sequence[Request],
    is_short: Callable[[Request], bool],
    short: Callable[[list[Request]], Sequence[Answer]],
    long: Callable[[list[Request]], Sequence[Answer]],
) -> list[Answer]:
    """Answers short and long requests by functions of their own, in the order in which they were asked.

    Example:
        >>> answer_apart([1, 12, 3], lambda x: x < 10, lambda xs: [-x for x in xs], lambda xs: [x * x for x in xs])
        [-1, 144, -3]
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for index, request in enumerate(requests):
        sides[not is_short(request)].append(index)
    answers: dict[int, Answer] = {}
    for indices, answer in zip(sides, (short, long), strict=True):
        if indices:
            answers.update(zip(indices, answer([requests[index] for index in indices]), strict=True))
    return [answers[index] for index in range(len(requests))]


def by_context(pairs: Iterable[tuple[Sequence[int], Item]]) -> dict[tuple[int, ...], list[Item]]:
    """What belongs to the same context together, so that it is read once.

    Example:
        >>> by_context([([1, 2], "a"), ([3], "b"), ([1, 2], "c")])
        {(1, 2): ['a', 'c'], (3,): ['b']}
    """
    groups: dict[tuple[int, ...], list[Item]] = {}
    for context, item in pairs:
        groups.setdefault(tuple(context), []).append(item)
    return groups


@torch.no_grad()
def score_continuations(
    lm: MemoryLM,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    softmax_dtype: torch.dtype | None = None,
) -> list[Score]:
    """Scores texts that go on from one context; the context is read once, whatever its length.

    The context goes through window and memory as a prompt of :meth:`MemoryLM.generate` does, so that what that would
    generate is greedy here, token by token. Each continuation then goes on from a copy of that state.

    Args:
        lm: The attached model; its memory starts empty.
        context: Token ids, at least one.
        continuations: Token ids of each, at least one.
        softmax_dtype: Of the log-probabilities; None takes that of the logits.

    Returns:
        One for each continuation.

    Raises:
        SettingError: The context, or a continuation, is empty; or the model's way of attending does not go on.
    """
    lm.attachment.way.settings.check_goes_on("scoring what goes on from a context")
    if not context or not all(continuations):
        raise SettingError("request", "", "has no token to score or to go on from", "Give at least one of each.")
    cache = _after(lm, context)
    rows, longest = len(continuations), max(map(len, continuations))
    cache.batch_repeat_interleave(rows)
    # Each token is predicted from the one before it; the context's last is still to be read.
    inputs = torch.zeros(rows, longest, dtype=torch.int64)
    targets = torch.full((rows, longest), IGNORED)
    for row, continuation in enumerate(continuations):
        tokens = torch.tensor(continuation)
        inputs[row, : len(tokens)] = torch.cat([torch.tensor([context[-1]]), tokens[:-1]])
        targets[row, : len(tokens)] = tokens
    inputs, targets = inputs.to(lm.device), targets.to(lm.device)
    begin = cache.seen
    cache.ends = torch.tensor([begin + len(continuation) for continuation in continuations])
    logprobs = torch.zeros(rows, dtype=torch.float64, device=lm.device)
    greedy = torch.ones(rows, dtype=torch.bool, device=lm.device)
    while (start := cache.seen - begin) < longest:
        stop = min(longest, start + cache.room)
        logits = forward_cached(lm.model, inputs[:, start:stop], cache, stop - start)
        assert logits is not None
        found, likeliest = _judge(logits, targets[:, start:stop], softmax_dtype)
        logprobs += found
        greedy &= likeliest
    return [Score(*pair) for pair in zip(logprobs.tolist(), greedy.tolist(), strict=True)]


def _after(lm: MemoryLM, context: Sequence[int]) -> MemoryCache:
    """The state of one row that has read all but the last token of a context."""
    config, memory = lm.config, lm.new_memory(1)
    ids = torch.tensor([list(context)], device=lm.device)
    last = config.last_context_length
    if last is not None and len(context) > config.window:
        # As in LongLLaMA: see `MemoryLM.generate`.
        lm.ingest(ids[:, :-last], memory)
        ids = ids[:, -last:]
    cache = lm.attachment.new_cache(memory, while_generating(config))
    read_cached(lm.model, ids, torch.tensor([ids.shape[1] - 1]), cache)
    return cache


def _judge(logits: Tensor, targets: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities summed (B,) float64 and whether all is greedy (B,), for logits (B, L, V), targets (B, L)."""
    wanted = targets != IGNORED
    logprobs = logits.log_softmax(-1, dtype=dtype).gather(2, targets.clamp_min(0)[..., None])[..., 0]
    likeliest = (logits.argmax(-1) == targets) | ~wanted
    return logprobs.double().masked_fill(~wanted, 0).sum(1), likeliest.all(1)
