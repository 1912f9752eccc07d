"""Perplexity with other documents in the memory, and the share of attention that stays with the document itself.

The paper's multi-document setting (section 4.2, figure 4): the memory is shared by documents, and the more of them it
holds, the more a key of the right one has to be told apart from others.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.bench.measure import softmax_scores
from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.perplexity import block_sums, losses_with_memory
from lightning_fot.evaluation.measures.retrieval import Capture, index_used, sample_rows
from lightning_fot.evaluation.plan import INGEST_COST, Rows

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

# Queries a head whose attention over all of the memory is computed.
_QUERIES = 128


def measure_distraction(
    lm: MemoryLM,
    spec: RetrieverSpec,
    documents: Sequence[tuple[str, Tensor, Tensor]],
    others: Tensor,
    amounts: Sequence[int],
    advance: Callable[[float], None] = lambda units: None,
    *,
    done: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[Rows], None] = lambda rows: None,
    folder: Path | None = None,
) -> Rows:
    """Reads other documents once, piece by piece, and each document behind each amount of them.

    Killed and called again with what it has kept, it goes on behind the last row; with a folder, the other documents
    that were read by then are not read again either.

    Args:
        lm: The model.
        spec: Specification of the retriever.
        documents: Name, context (c,) and target (n + 1,) ids of each.
        others: Ids (m,) of other documents, at least ``max(amounts)``.
        amounts: Tokens of them, ascending.
        advance: Called with the token passes done.
        done: Rows that an earlier call has kept.
        keep: Called with all rows so far, after each.
        folder: Where the memory of the other documents is kept until the last amount; None reads them again.

    Returns:
        For each amount and document: ``document``, ``distractor_tokens``, ``blocks`` (as for perplexity),
        ``own_share`` (None where the memory has a capacity), ``index_used``, ``target_s``.
    """
    rows: Rows = [dict(row) for row in done]
    known = Counter(row["distractor_tokens"] for row in rows)
    left = [amount for amount in amounts if known[amount] < len(documents)]
    shared, read = _kept(lm, spec, folder, amounts)
    # Those that are done are read too: a window ends where a piece does, so that the pieces stay the same.
    for amount in [amount for amount in amounts if left and amount <= left[-1]]:
        if amount > read:
            read = _read_others(lm, shared, others, read, amount, folder, advance)
        for name, context, target in documents[known[amount] :]:
            rows.append(
                {"document": name, "distractor_tokens": amount, **_behind(lm, shared, context, target, advance)}
            )
            keep(rows)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _kept(lm: MemoryLM, spec: RetrieverSpec, folder: Path | None, amounts: Sequence[int]) -> tuple[Memory, int]:
    """The memory of the other documents as far as it was read before, and their tokens; an empty one otherwise."""
    if folder is not None and folder.is_dir():
        try:
            memory = lm.load_memory(folder, spec)
        except SettingError:
            # Written by other weights, or damaged: it is read again.
            shutil.rmtree(folder, ignore_errors=True)
        else:
            read = int(memory.tokens_seen[0])
            if read in amounts:
                return memory, read
    return lm.new_memory(1, spec), 0


def _read_others(
    lm: MemoryLM,
    shared: Memory,
    others: Tensor,
    start: int,
    stop: int,
    folder: Path | None,
    advance: Callable[[float], None],
) -> int:
    """Reads the other documents from ``start`` on, and keeps what was read; gives ``stop``."""
    lm.ingest(others[None, start:stop], memory=shared, progress=lambda n: advance(n * INGEST_COST))
    if folder is not None and lm.config.capacity is None:
        # A full disk is no reason to stop: it would be read again.
        with suppress(SettingError):
            shared.save(folder)
    return stop


def _behind(
    lm: MemoryLM, shared: Memory, context: Tensor, target: Tensor, advance: Callable[[float], None]
) -> dict[str, Any]:
    """Losses of a target behind its context and what ``shared`` holds, which stays as it is."""
    memory = shared.snapshot()
    before = {number: max(layer.lengths, default=0) for number, layer in memory.layers.items()}
    lm.ingest(context[None], memory=memory, progress=lambda n: advance(n * INGEST_COST))
    memory.flush()
    capture = Capture(lm)
    began = time.perf_counter()
    with capture.target(memory):
        losses = losses_with_memory(lm, target, memory, advance)
    return {
        "blocks": [list(block) for block in block_sums(losses)],
        # With a capacity the oldest rows go and the others are renumbered: whose they are is not known.
        "own_share": None if lm.config.capacity else own_share(lm, memory, capture.queries, before),
        "index_used": index_used(memory),
        "target_s": time.perf_counter() - began,
    }


@torch.no_grad()
def own_share(
    lm: MemoryLM,
    memory: Memory,
    queries: dict[int, Tensor],
    before: dict[int, int],
    after: dict[int, int] | None = None,
) -> float:
    """Share of all attention on the memory that keys from row ``before`` on hold: the paper's r_d, exactly computed.

    Scores are scaled and capped as the layer's are. An attention sink takes of both sides alike: the share stays.

    Args:
        lm: The model.
        memory: Of one row.
        queries: (G, Q, D) by layer, as searched; a sample of them counts.
        before: Rows of other documents, by layer.
        after: By layer the row behind the last that counts; None counts all to the end.

    Returns:
        Mean over layers, heads and queries; 1 where there are no other documents.
    """
    shares = []
    for number, found in queries.items():
        begin, end = before[number], None if after is None else after[number]
        scale, softcap = lm.attachment.attention_scale(number), lm.attachment.softcap(number)
        for bank, asked in enumerate(sample_rows(found, _QUERIES).float()):
            everything = own = torch.full((len(asked),), -torch.inf, device=asked.device)
            for first, keys in memory.layers[number].key_blocks(bank):
                scores = softmax_scores(asked @ keys.float().T, scale, softcap)
                everything = torch.logaddexp(everything, scores.logsumexp(1))
                of_own = scores[:, max(0, begin - first) : None if end is None else max(0, end - first)]
                own = torch.logaddexp(own, of_own.logsumexp(1))
            shares.append((own - everything).exp())
    return float(torch.cat(shares).double().mean())
