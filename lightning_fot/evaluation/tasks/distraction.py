"""Whose keys the attention goes to when the memory holds d documents (FoT paper, section 3.3).

As in crossbatch training each document is read on its own; then d of them share a memory, and the window that follows
one of them attends to it. r_d is the share of the attention on the memory that goes to that document's own keys: about
1/d where keys of different texts are not told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.config.tasks import DistractionTask
from lightning_fot.evaluation.measures.multi_doc import own_share
from lightning_fot.evaluation.measures.retrieval import index_used
from lightning_fot.evaluation.plan import INGEST_COST, LOCAL_COST
from lightning_fot.evaluation.tasks.parts.texts import HeldOut, ids_of
from lightning_fot.model.reading.batched import read

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

Row = dict[str, Any]
Advance = Callable[[float], None]
FIELDS = ("own_share", "own_share_found", "memory_mass")


class Distraction:
    """The task: documents of the user's own text.

    Args:
        settings: What is measured.
        texts: As many held-out documents as the settings ask for.
    """

    def __init__(self, settings: DistractionTask, texts: Sequence[HeldOut]) -> None:
        self._settings = settings
        self._texts = texts

    def measure(self, lm: MemoryLM, length: int, spec: RetrieverSpec | None, advance: Advance) -> list[Row]:
        """A row for each number of documents: ``documents``, the fields of :func:`shares` as lists, ``index_used``."""
        window = lm.config.window
        contexts = [ids_of(text, 0, length).to(lm.device) for text in self._texts]
        targets = [ids_of(text, length, length + window).to(lm.device) for text in self._texts]
        alone = [_read_alone(lm, context, advance) for context in contexts]
        return [
            distraction(lm, alone, targets, count, self._settings.scored, spec, advance)
            for count in self._settings.counts
        ]


@torch.no_grad()
def distraction(
    lm: MemoryLM,
    alone: Sequence[Memory],
    targets: Sequence[Tensor],
    count: int,
    scored: int,
    spec: RetrieverSpec | None = None,
    advance: Advance = lambda units: None,
) -> Row:
    """Shares of the attention of the first ``scored`` documents, each in a memory of ``count`` of them.

    Args:
        lm: The model.
        alone: A memory of each document, all of whole groups of ``count``.
        targets: The window (T,) that follows each.
        count: Documents that share a memory: the first ``count``, the next ``count``, and so on.
        scored: Documents that ask.
        spec: Specification of the retriever; None takes the configured one.
        advance: Called with the token passes done.
    """
    row: Row = {"documents": count, "index_used": None, **{field: [] for field in FIELDS}}
    for start in range(0, scored, count):
        group = alone[start : start + count]
        memory = lm.new_memory(1, spec)
        for one in group:
            memory.append({number: (layer.keys, layer.values) for number, layer in one.layers.items()})
        memory.flush()
        row["index_used"] = index_used(memory)
        first = 0
        for place, one in enumerate(group[: scored - start]):
            target = targets[start + place]
            found = shares(lm, memory, first, first + len(one), target)
            for field, value in found.items():
                row[field].append(value)
            first += len(one)
            advance(len(target) * LOCAL_COST)
    return row


def shares(lm: MemoryLM, memory: Memory, first: int, stop: int, target: Tensor) -> dict[str, float]:
    """How a window's attention is shared out, mean over memory layers, heads and queries.

    Args:
        lm: The model.
        memory: Of one row, left as it is.
        first: First pair of the window's own document.
        stop: The pair behind its last.
        target: (T,) ids, at most a window.

    Returns:
        ``own_share``: of the softmax over all pairs of the memory, what its own document holds (r_d). A sample of the
        queries counts. ``own_share_found``: the same of the pairs that were retrieved, as the model weighs them.
        ``memory_mass``: of all attention, local context included, what goes to the memory.
    """
    with lm.record_attention() as trace, lm.record_queries() as recorded:
        # The window's own pairs, which the copy takes, come behind those that count.
        lm(target[None], memory=memory, logits_to_keep=1)
    # With a capacity the oldest pairs are gone, and the others renumbered.
    gone = int(memory.forgotten[0])
    first, stop = max(0, first - gone), max(0, stop - gone)
    mass, _ = trace.pair_mass(memory)
    total = float(mass.sum())
    asked = sum(windows[0].shape[0] * windows[0].shape[1] for windows in recorded.values())
    queries = {number: windows[0] for number, windows in recorded.items()}
    rows = [dict.fromkeys(memory.layers, place) for place in (first, stop)]
    return {
        "own_share": own_share(lm, memory, queries, *rows),
        "own_share_found": float(mass[first:stop].sum()) / total if total else 0.0,
        "memory_mass": total / asked,
    }


def _read_alone(lm: MemoryLM, context: Tensor, advance: Advance = lambda units: None) -> Memory:
    memory = lm.new_memory(1, "exact")
    read(lm.attachment, context, memory, lambda tokens: advance(tokens * INGEST_COST))
    return memory


def read_alone(lm: MemoryLM, contexts: Tensor) -> list[Memory]:
    """A memory of each of (n, c) texts."""
    return [_read_alone(lm, context) for context in contexts.to(lm.device)]
