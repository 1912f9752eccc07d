"""How far a context reaches: losses of a story's true continuation, by their distance from what is in the memory.

The memory holds the tokens before the continuation and stays as it is, so that a token of window i is that far from
all that it can look up; without a memory each window is read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.config.tasks import StoryTask
from lightning_fot.evaluation.measures.perplexity import read_logits, token_losses
from lightning_fot.evaluation.measures.retrieval import index_used
from lightning_fot.evaluation.plan import INGEST_COST, LOCAL_COST
from lightning_fot.evaluation.tasks.names import far_names
from lightning_fot.evaluation.tasks.parts.texts import HeldOut, ids_of
from lightning_fot.model.reading.batched import read

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

Row = dict[str, Any]


class Story:
    """The task: the first held-out documents that are long enough.

    Args:
        settings: What is measured.
        tokenizer: Its tokenizer.
        texts: As many held-out documents as the settings ask for.
    """

    def __init__(self, settings: StoryTask, tokenizer: Any, texts: Sequence[HeldOut]) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._texts = texts[: settings.stories]
        self._longest = settings.lengths[-1]

    @torch.no_grad()
    def measure(
        self, lm: MemoryLM, length: int, spec: RetrieverSpec | None, advance: Callable[[float], None]
    ) -> list[Row]:
        """A row for each story.

        Returns:
            ``windows``: (sum of losses in nats, tokens) of each; ``names``: the same of each name that the shortest
            context has and the local window so far has not; ``index_used``.
        """
        rows = []
        for text in self._texts:
            # Behind contexts of all lengths the same continuation.
            start, stop = self._longest, self._longest + self._settings.target_tokens
            target = ids_of(text, start, stop + 1).to(lm.device)
            memory = None
            if spec is not None:
                memory = lm.new_memory(1, spec)
                context = ids_of(text, start - length, start)
                read(lm.attachment, context, memory, lambda tokens: advance(tokens * INGEST_COST))
                memory.flush()
            row: Row = {"story": text.name, "index_used": None if memory is None else index_used(memory), "windows": []}
            parts = []
            for place in range(0, len(target) - 1, lm.config.window):
                ids = target[place : place + lm.config.window + 1]
                parts.append(token_losses(read_logits(lm, ids[:-1], memory)[0], ids[1:]))
                row["windows"].append(_sum(parts[-1]))
                advance(len(parts[-1]) * LOCAL_COST)
            losses = torch.cat(parts)
            shortest = ids_of(text, start - self._settings.lengths[0], start)
            places = far_names(self._tokenizer, shortest.tolist(), target.tolist(), lm.config.window)
            # Loss t is that of token t + 1.
            row["names"] = [_sum(losses[first - 1 : stop - 1]) for first, stop in places]
            rows.append(row)
        return rows


def _sum(losses: Tensor) -> list[float | int]:
    return [float(losses.double().sum()), len(losses)]
