"""Perplexity of the same target tokens behind contexts of several lengths, kept in memory.

The target of a document is ``input[0..n-1]`` predicting ``input[1..n]``; the context of ``c`` tokens lies right before
it and is only in memory, so that every memory kind and context length reads the same local windows and scores the same
tokens. Memory ``none`` is each window of the target alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot.evaluation.measures.whole_text import read_whole

if TYPE_CHECKING:
    from lightning_fot.evaluation.speed.split import Stopwatch
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

BLOCK = 256
# Target tokens read in one call: bounds the logits held at once (2048 x 49k fp32 is 400 MB).
TOKENS_A_CALL = 2048
LOGIT_ROWS = 256


@dataclass(frozen=True)
class Estimate:
    """A mean of per-token losses with its standard error.

    Args:
        mean: Nats a token.
        standard_error: Of the mean; None from fewer than two blocks.
        tokens: Tokens scored.
        blocks: Blocks the standard error rests on.
    """

    mean: float
    standard_error: float | None
    tokens: int
    blocks: int


def block_sums(losses: Tensor, block: int = BLOCK) -> list[tuple[float, int]]:
    """Losses (n,) summed over consecutive blocks: (sum in nats, tokens) for each; the last may be shorter."""
    return [(float(part.double().sum()), len(part)) for part in torch.split(losses, block)]


def estimate(blocks: Sequence[tuple[float, int]]) -> Estimate:
    """Mean loss and its standard error from block sums.

    Tokens next to each other are not independent, blocks of 256 nearly are, so a block is the unit of sampling. With
    N = Σ n_i tokens in m blocks and mean μ the standard error is sqrt(m / (m-1) · Σ (s_i - μ n_i)²) / N: the spread of
    block means over sqrt(m) when blocks are equal. It covers the choice of blocks, not of documents: blocks of one
    document are alike, so with few documents the true uncertainty about other documents is larger.

    Args:
        blocks: (sum, tokens) of each block.
    """
    tokens = sum(count for _, count in blocks)
    mean = sum(total for total, _ in blocks) / tokens
    m = len(blocks)
    error = None
    if m > 1:
        error = math.sqrt(m / (m - 1) * sum((total - mean * count) ** 2 for total, count in blocks)) / tokens
    return Estimate(mean, error, tokens, m)


def difference(ours: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]]) -> Estimate:
    """Nats a token that ``ours`` saves over ``base`` on the same blocks: paired, so that easy and hard text cancels."""
    return estimate([(b - a, count) for (a, count), (b, _) in zip(ours, base, strict=True)])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (n, V) against targets (n,): (n,) float32, without an fp32 copy of all logits."""
    parts = zip(torch.split(logits, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
    return torch.cat([F.cross_entropy(rows.float(), labels, reduction="none").cpu() for rows, labels in parts])


def read_logits(lm: MemoryLM, ids: Tensor, memory: Memory | None, keep: int = 0) -> tuple[Tensor, Memory]:
    """Logits (n or ``keep``, V) of ids (n,) behind a memory, and the memory after them."""
    out = lm(ids[None], memory=memory, logits_to_keep=keep)
    assert out.logits is not None
    return out.logits[0], out.memory


@torch.no_grad()
def losses_without_memory(lm: MemoryLM, target: Tensor, advance: Callable[[int], None] | None = None) -> Tensor:
    """Losses (n,) of a target (n + 1,), each window alone."""
    inputs, labels = target[:-1], target[1:]
    found = []
    window = lm.config.window
    for ids, wanted in zip(torch.split(inputs, window), torch.split(labels, window), strict=True):
        found.append(token_losses(read_logits(lm, ids, None)[0], wanted))
        if advance is not None:
            advance(len(ids))
    return torch.cat(found)


@torch.no_grad()
def losses_with_memory(
    lm: MemoryLM,
    target: Tensor,
    memory: Memory,
    advance: Callable[[int], None] | None = None,
    watch: Stopwatch | None = None,
) -> Tensor:
    """Losses (n,) of a target (n + 1,) behind what is in ``memory``, which stays as it is.

    Windows of the target are stored as they are read: later ones also find earlier ones. ``watch`` takes what the
    memory did meanwhile.
    """
    inputs, labels = target[:-1], target[1:]
    window = lm.config.window
    # A cut between calls is a cut between windows only where windows share nothing.
    whole = lm.config.overlap or lm.config.sink_tokens
    step = len(inputs) if whole else max(window, TOKENS_A_CALL // window * window)
    reading = memory
    found = []
    for ids, wanted in zip(torch.split(inputs, step), torch.split(labels, step), strict=True):
        logits, reading = read_logits(lm, ids, reading)
        if watch is not None:
            watch.count(reading)
        found.append(token_losses(logits, wanted))
        if advance is not None:
            advance(len(ids))
    return torch.cat(found)


@torch.no_grad()
def losses_of_whole(
    lm: MemoryLM,
    context: Tensor,
    target: Tensor,
    reading: str,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[Tensor, float]:
    """Losses (n,) of a target (n + 1,) that is read with its context (c,) as one text, without a memory.

    Returns:
        The losses, and the seconds from the start to the first of them.
    """
    labels = target[1:]
    began, first, found, done = time.perf_counter(), 0.0, [], 0
    for logits in read_whole(lm, torch.cat([context, target[:-1]]), len(labels), reading, advance):
        first = first or time.perf_counter() - began
        found.append(token_losses(logits, labels[done : done + len(logits)]))
        done += len(logits)
    return torch.cat(found), first
