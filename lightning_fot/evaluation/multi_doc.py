"""Perplexity with other documents in the memory, and the share of attention that stays with the document itself.

The paper's multi-document setting (section 4.2, figure 4): the memory is shared by documents, and the more of them it
holds, the more a key of the right one has to be told apart from others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.evaluation.perplexity import block_sums, difference, estimate, losses_with_memory
from lightning_fot.evaluation.plan import INGEST_COST
from lightning_fot.evaluation.retrieval import Capture, attention_scale, index_used, sample_rows

if TYPE_CHECKING:
    from lightning_fot.lm import MemoryLM
    from lightning_fot.memory import Memory

Record = list[dict[str, Any]]
# Queries a head whose attention over all of the memory is computed.
_QUERIES = 128


def measure_distraction(
    lm: MemoryLM,
    spec: Any,
    documents: Sequence[tuple[str, Tensor, Tensor]],
    others: Tensor,
    amounts: Sequence[int],
    advance: Callable[[float], None] = lambda units: None,
) -> Record:
    """Reads other documents once, piece by piece, and each document behind each amount of them.

    Args:
        lm: The model.
        spec: Specification of the retriever.
        documents: Name, context (c,) and target (n + 1,) ids of each.
        others: Ids (m,) of other documents, at least ``max(amounts)``.
        amounts: Tokens of them, ascending.
        advance: Called with the token passes done.

    Returns:
        For each amount and document: ``document``, ``distractor_tokens``, ``blocks`` (as for perplexity),
        ``own_share`` (None where the memory has a capacity), ``index_used``, ``target_s``.
    """
    shared, read = lm.new_memory(1, spec), 0
    rows: Record = []
    for amount in amounts:
        if amount > read:
            lm.ingest(others[None, read:amount], memory=shared, progress=lambda n: advance(n * INGEST_COST))
            read = amount
        for name, context, target in documents:
            memory = shared.snapshot()
            before = {number: max(layer.lengths, default=0) for number, layer in memory.layers.items()}
            lm.ingest(context[None], memory=memory, progress=lambda n: advance(n * INGEST_COST))
            memory.flush()
            capture = Capture(lm)
            began = time.perf_counter()
            with capture.target(memory):
                losses = losses_with_memory(lm, target, memory, advance)
            rows.append(
                {
                    "document": name,
                    "distractor_tokens": amount,
                    "blocks": [list(block) for block in block_sums(losses)],
                    # With a capacity the oldest rows go and the others are renumbered: whose they are is not known.
                    "own_share": None if lm.config.capacity else own_share(lm, memory, capture.queries, before),
                    "index_used": index_used(memory),
                    "target_s": time.perf_counter() - began,
                }
            )
    return rows


@torch.no_grad()
def own_share(lm: MemoryLM, memory: Memory, queries: dict[int, Tensor], before: dict[int, int]) -> float:
    """Share of all attention on the memory that keys from row ``before`` on hold: the paper's r_d, exactly computed.

    Args:
        lm: The model.
        memory: Of one row.
        queries: (G, Q, D) by layer, as searched; a sample of them counts.
        before: Rows of other documents, by layer.

    Returns:
        Mean over layers, heads and queries; 1 where there are no other documents.
    """
    shares = []
    for number, found in queries.items():
        keys = memory.layers[number].keys[0].float()
        for bank, asked in zip(keys, sample_rows(found, _QUERIES).float(), strict=True):
            weights = torch.softmax(attention_scale(lm, number) * (asked @ bank.T), dim=1)
            shares.append(weights[:, before[number] :].sum(1))
    return float(torch.cat(shares).double().mean())


def distraction_rows(memory: str, context: int, record: Record) -> list[dict[str, Any]]:
    """Rows of ``results.json``.

    Each has ``context_tokens`` (of the document itself), ``distractor_tokens``, ``memory``, ``value`` (perplexity) with
    ``standard_error``, ``nll``, ``tokens``, ``documents``, ``own_share``, and over the same tokens without other
    documents ``rise_nats`` with ``rise_standard_error``.
    """
    rows = []
    base: list[tuple[float, int]] = []
    for amount in sorted({row["distractor_tokens"] for row in record}):
        parts = [row for row in record if row["distractor_tokens"] == amount]
        blocks = [(total, count) for part in parts for total, count in part["blocks"]]
        base = base or blocks
        found, saved = estimate(blocks), difference(blocks, base)
        value = float(torch.tensor(found.mean, dtype=torch.float64).exp())
        row: dict[str, Any] = {
            "context_tokens": context,
            "distractor_tokens": amount,
            "memory": memory,
            "value": value,
            "standard_error": None if found.standard_error is None else value * found.standard_error,
            "nll": found.mean,
            "tokens": found.tokens,
            "documents": len(parts),
            "own_share": _mean([part["own_share"] for part in parts]),
            "rise_nats": 0.0 - saved.mean,
            "rise_standard_error": saved.standard_error,
        }
        used = {part["index_used"] for part in parts}
        if used != {None}:
            row["index_used"] = True in used
        if parts[0].get("same_as"):
            row["same_as"] = parts[0]["same_as"]
        rows.append(row)
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
