"""Passkey retrieval: find a number told somewhere in a long prompt (Mohtashami & Jaggi; FoT paper section 4.3).

The last window of the prompt is local, all before it is in memory. An answer counts when each of its tokens is the
most likely one given those before it, which is what greedy decoding gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.evaluation.measures.perplexity import read_logits
from lightning_fot.evaluation.measures.whole_text import read_whole

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig
    from lightning_fot.data.mixture.passkey import PasskeyExample
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927): sensible at 0 and 1 and for few trials.

    Example:
        >>> [round(bound, 2) for bound in wilson(3, 3)]
        [0.44, 1.0]
    """
    rate, z2 = successes / trials, Z95 * Z95
    middle = rate + z2 / (2 * trials)
    spread = Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    norm = 1 + z2 / trials
    return max(0.0, (middle - spread) / norm), min(1.0, (middle + spread) / norm)


def passkey_examples(config: EvaluationConfig, tokenizer: Any) -> list[tuple[int, PasskeyExample]]:
    """All prompts of an evaluation with their lengths in tokens.

    Args:
        config: What to measure.
        tokenizer: Of the model.

    Raises:
        SettingError: A length is too short for the tokenizer.
    """
    from lightning_fot.data.mixture.passkey import passkey_prompt

    return [
        (length, passkey_prompt(tokenizer, length, seed=sample))
        for length in sorted(set(config.passkey_tokens))
        for sample in range(config.passkey_samples)
    ]


def split_prompt(example: PasskeyExample, local: int) -> tuple[list[int], list[int]]:
    """Tokens for the memory, and the local rest: the prompt's end and the answer but its last token, teacher-forced.

    Args:
        example: Prompt and answer.
        local: Tokens that stay local; the rest never holds fewer than the answer needs.
    """
    answer = [int(token) for token in example.answer_ids]
    tokens = [int(token) for token in example.prompt_ids] + answer[:-1]
    cut = max(len(tokens) - max(local, len(answer)), 0)
    return tokens[:cut], tokens[cut:]


def shared_memories(
    lm: MemoryLM,
    prefixes: Sequence[Sequence[int]],
    retriever: RetrieverSpec,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Memory]]:
    """A memory of each prefix, each distinct run of windows read once.

    Prompts share their beginning up to the window that holds the key. A memory depends only on the windows read, so
    prompts in sorted order continue from a snapshot of what they share with those before.

    Args:
        lm: The model.
        prefixes: Tokens to be read into memory, from the start of each prompt.
        retriever: Specification for the memories.
        advance: Called with the tokens of each window that is read, and of those that need not be read again.

    Yields:
        (place in ``prefixes``, memory of exactly that prefix); the memory is the caller's to change.
    """
    tell = advance or (lambda tokens: None)
    window = lm.config.window
    # With an overlap or sinks a window also depends on local tokens that a memory does not hold.
    shareable = not (lm.config.overlap or lm.config.sink_tokens)
    order = sorted(range(len(prefixes)), key=lambda place: list(prefixes[place]))
    common = [_common(prefixes[a], prefixes[b]) // window * window if shareable else 0 for a, b in pairwise(order)] + [
        0
    ]
    kept: list[tuple[int, Memory]] = []
    for step, place in enumerate(order):
        shared = common[step - 1]
        kept = [(length, memory) for length, memory in kept if length <= shared]
        done, memory = (kept[-1][0], kept[-1][1].snapshot()) if kept else (0, lm.new_memory(1, retriever))
        tell(done)
        tokens = prefixes[place]
        starts = _later_starts(common[step:], done)
        for stop in [*starts, len(tokens)]:
            if stop > done:
                lm.ingest(torch.tensor([list(tokens[done:stop])], device=lm.device), memory=memory, progress=tell)
                done = stop
                if stop in starts:
                    kept.append((stop, memory.snapshot()))
        yield place, memory


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def _later_starts(common: Sequence[int], done: int) -> list[int]:
    """Lengths above ``done`` from which a later prompt will continue: the running minima of what follows shares."""
    starts: set[int] = set()
    lowest = common[0]
    for length in common:
        lowest = min(lowest, length)
        starts.add(lowest)
    return sorted(start for start in starts if start > done)


@torch.no_grad()
def answer_is_found(lm: MemoryLM, example: PasskeyExample, local_ids: Sequence[int], memory: Memory | None) -> bool:
    """Whether every answer token is the most likely one after the local tokens and what is in memory."""
    answer = torch.tensor([int(token) for token in example.answer_ids])
    ids = torch.tensor(list(local_ids), device=lm.device)
    logits, _ = read_logits(lm, ids, memory, keep=len(answer))
    return bool((logits.argmax(-1).cpu() == answer).all())


@torch.no_grad()
def whole_answer_is_found(
    lm: MemoryLM, example: PasskeyExample, reading: str, advance: Callable[[int], None] = lambda tokens: None
) -> bool:
    """As :func:`answer_is_found`, of a prompt that is read as one text, without a memory."""
    tokens = [token for part in split_prompt(example, 1) for token in part]
    answer = torch.tensor([int(token) for token in example.answer_ids])
    parts = read_whole(lm, torch.tensor(tokens, device=lm.device), len(answer), reading, advance)
    return bool((torch.cat([logits.argmax(-1).cpu() for logits in parts]) == answer).all())
