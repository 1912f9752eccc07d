"""How well and how fast an index finds what attention looks for, on real queries and keys.

Recall alone hides what matters to attention, so it always comes with the softmax mass that the found pairs hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.bench.measure import DEFAULT_QUERY_GRIDS, first_occurrences, measure_retriever, softmax_scores
from lightning_fot.config.retriever import RetrieverSpec, retriever_label
from lightning_fot.evaluation.speed.limits import scan_limit, scanned_bytes
from lightning_fot.evaluation.speed.timing import SearchTimes, time_calls

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig
    from lightning_fot.memory.base import BaseLayer
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

# Scores held at once: 2**24 fp32 scores are 64 MiB.
MAX_SCORES = 2**24
# Two fp32 engines sum in other orders: a found key this close to the k-th true score, relative to it, is a tie.
TIE = 1e-5
# Past queries kept of each window read: the query-aware map needs a few thousand in all.
PAST_A_WINDOW = 64


@dataclass(frozen=True)
class RetrievalQuality:
    """What searches found, against exact search over the same keys.

    Args:
        recall: Share of the true k nearest that was found. Tie-safe: a found key counts when its score reaches the
            k-th true score; one found twice counts once.
        mass_recall: Softmax mass of the found keys, whether they are among the true k nearest or not, over that of the
            true k nearest.
        mass: Softmax mass of the found keys over that of all keys in memory: how much of a dense read is kept. An
            attention sink takes of both alike, and changes neither.
        sink_share: Share of the found slots that hold the first token of a window (attention sinks); None where it is
            not known which rows these are.
        hub_share: Share of the found slots held by the most often found hundredth of the keys.
        hub_skewness: Skewness of how often a key is found (its k-occurrences; Radovanović et al., JMLR 2010, equation
            1), mean over banks. Keys found at random, m times on average, have 1/sqrt(m).
        queries: Queries measured, over all banks.
    """

    recall: float
    mass_recall: float
    mass: float
    sink_share: float | None
    hub_share: float
    hub_skewness: float
    queries: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def window_starts(tokens: int, stored_per_window: int) -> Tensor:
    """Rows (n,) of the first stored token of each window, for a memory filled with whole windows."""
    return torch.arange(0, tokens, stored_per_window)


def sample_rows(queries: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` of the queries (banks, Q, D) without replacement, the same places in every bank, in order."""
    available = queries.shape[1]
    if available <= count:
        return queries
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(available, generator=generator)[:count].sort().values
    return queries[:, places.to(queries.device)]


@torch.no_grad()
def retrieval_quality(
    keys: Tensor | BaseLayer,
    queries: Tensor,
    rows: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    sink_rows: Tensor | None = None,
) -> RetrievalQuality:
    """Compares found rows with an exact search over the same keys ("shadow search").

    Args:
        keys: (banks, M, D), any float dtype; scores are computed in float32. Or the layer that holds them: read in
            pieces, so that keys in eight bits or in a file are never all in memory as float32.
        queries: (banks, Q, D), as the layer searched with them.
        rows: (banks, Q, k) int64 found row numbers, -1 where none was found.
        scale: Factor on scores inside the softmax; None means 1/sqrt(D).
        softcap: Soft cap of the scores inside the softmax; None means none.
        lengths: (banks,) keys that count in each bank; None means M. A layer knows them.
        sink_rows: (n,) rows that hold the first token of a window.

    Raises:
        ValueError: Shapes disagree, or there is nothing to compare.
    """
    held, dim = _held(keys, lengths)
    if queries.shape[0] != len(held) or queries.shape[-1] != dim or rows.shape[:2] != queries.shape[:2]:
        shape = (len(held), max(held, default=0), dim)
        raise ValueError(f"keys {shape}, queries {tuple(queries.shape)}, rows {tuple(rows.shape)} disagree")
    if not queries.shape[1] or not rows.shape[2] or not max(held, default=0):
        raise ValueError("quality needs at least one key, one query and k of at least 1")
    scale = 1 / math.sqrt(dim) if scale is None else scale
    found_true = true_total = slots = sink_slots = hub_slots = 0
    mass_recalls, masses, skews = [], [], []
    for bank, count in enumerate(held):
        if not count:
            continue
        asked, found, k = queries[bank].float(), rows[bank].to(queries.device), min(rows.shape[2], count)
        best, at_rows, total = _scored(asked, found, k, scale, softcap, _pieces(keys, bank, count, len(asked)))
        kept = first_occurrences(found)
        kth = best[:, -1:]
        reached = kept & (at_rows >= kth - TIE * kth.abs())
        found_true += int(reached.sum(1).clamp_max(k).sum())
        true_total += k * len(asked)
        found_mass = torch.logsumexp(softmax_scores(at_rows, scale, softcap).masked_fill(~kept, -math.inf), dim=-1)
        masses.append((found_mass - total).exp())
        best_mass = torch.logsumexp(softmax_scores(best, scale, softcap), dim=-1)
        mass_recalls.append((found_mass - best_mass).exp().clamp_max(1.0))
        hits = torch.bincount(found[kept].cpu(), minlength=count)
        slots += int(hits.sum())
        hub_slots += int(hits.topk(max(1, count // 100)).values.sum())
        skews.append(skewness(hits))
        if sink_rows is not None:
            sink_slots += int(hits[sink_rows[sink_rows < count]].sum())
    return RetrievalQuality(
        recall=found_true / true_total,
        mass_recall=float(torch.cat(mass_recalls).double().mean()),
        mass=float(torch.cat(masses).double().mean()),
        sink_share=None if sink_rows is None else sink_slots / max(slots, 1),
        hub_share=hub_slots / max(slots, 1),
        hub_skewness=sum(skews) / len(skews),
        queries=sum(len(part) for part in masses),
    )


def _held(keys: Tensor | BaseLayer, lengths: Tensor | None) -> tuple[list[int], int]:
    """Keys that count in each bank, and the size of a key."""
    if not isinstance(keys, Tensor):
        return [length for length in keys.lengths for _ in range(keys.kv_heads)], keys.key_dim
    banks, stored, dim = keys.shape
    if lengths is None:
        return [stored] * banks, dim
    return [int(length) for _, length in zip(range(banks), lengths, strict=True)], dim


def _pieces(keys: Tensor | BaseLayer, bank: int, count: int, queries: int) -> Iterator[tuple[int, Tensor]]:
    """Keys (n, D) of a bank and the row of the first, few enough for their scores to be held."""
    size = max(1, MAX_SCORES // queries)
    if not isinstance(keys, Tensor):
        yield from keys.key_blocks(bank, size)
        return
    for first in range(0, count, size):
        yield first, keys[bank, first : min(count, first + size)]


def _scored(
    asked: Tensor,
    found: Tensor,
    k: int,
    scale: float,
    softcap: float | None,
    pieces: Iterable[tuple[int, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """For queries (Q, D): the k best scores (Q, k), those of the rows found (Q, K), and log Σ exp of all (Q,)."""
    best = asked.new_zeros(len(asked), 0)
    at_rows = torch.full(found.shape, -math.inf, device=asked.device)
    total = torch.full((len(asked),), -math.inf, device=asked.device)
    for first, keys in pieces:
        scores = asked @ keys.float().T
        width = scores.shape[1]
        best = torch.cat((best, scores.topk(min(k, width)).values), dim=1)
        best = best.topk(min(k, best.shape[1])).values
        total = torch.logaddexp(total, torch.logsumexp(softmax_scores(scores, scale, softcap), dim=-1))
        inside = (found >= first) & (found < first + width)
        at_rows = torch.where(inside, scores.gather(1, (found - first).clamp(0, width - 1)), at_rows)
    return best, at_rows, total


def skewness(counts: Tensor) -> float:
    """Third standardised moment of counts (n,); 0 where all are alike.

    Example:
        >>> skewness(torch.tensor([0, 0, 0, 4]))  # doctest: +ELLIPSIS
        1.154...
    """
    deviations = counts.double() - counts.double().mean()
    spread = float(deviations.square().mean().sqrt())
    return float(deviations.pow(3).mean()) / spread**3 if spread else 0.0


def index_used(memory: Memory) -> bool | None:
    """Whether an index covers any key of the memory; None for exact retrievers, which have none."""
    from lightning_fot.retrievers.base import Retriever

    found: bool | None = None
    for layer in memory.layers.values():
        retriever = layer.retriever
        if retriever.exact:
            continue
        # A plug-in that does not tell what its index covers is taken to use it.
        silent = type(retriever).indexed is Retriever.indexed
        found = bool(found) or silent or bool((retriever.indexed > 0).any())
    return found


class Capture:
    """Real queries of one text, and the memory they searched.

    Args:
        lm: The model that reads.
    """

    def __init__(self, lm: MemoryLM) -> None:
        self.lm = lm
        self.memory: Memory | None = None
        self.past: dict[int, list[Tensor]] = {}
        self.queries: dict[int, Tensor] = {}

    def ingest(self, input_ids: Tensor, memory: Memory, advance: Callable[[int], None]) -> None:
        """Reads (1, T) into the memory and keeps a sample of the queries on the way."""
        with self.lm.record_queries() as recorded:

            def after_window(tokens: int) -> None:
                for layer, windows in recorded.items():
                    self.past.setdefault(layer, []).extend(
                        sample_rows(window, PAST_A_WINDOW, seed=place) for place, window in enumerate(windows)
                    )
                    windows.clear()
                advance(tokens)

            self.lm.ingest(input_ids, memory=memory, progress=after_window)

    @contextmanager
    def target(self, memory: Memory) -> Iterator[None]:
        """Keeps the queries with which the text read inside the block searches ``memory``."""
        with self.lm.record_queries() as recorded:
            yield
        self.memory = memory
        self.queries = {layer: torch.cat(windows, dim=1) for layer, windows in recorded.items()}

    def layer(self, number: int) -> tuple[BaseLayer, Tensor]:
        """Memory of a layer, and its queries (G, Q, D)."""
        assert self.memory is not None, "nothing was captured"
        return self.memory.layers[number], self.queries[number]


def measure_capture(
    capture: Capture, spec: RetrieverSpec, config: EvaluationConfig, advance: Callable[[float], None] | None = None
) -> list[dict[str, Any]]:
    """Recall and speed of a retriever over its query settings, built anew on the captured keys of each layer.

    Args:
        capture: Queries and memory.
        spec: The retriever's specification.
        config: Queries, repeats and query settings.
        advance: Called with the share done, after each layer.

    Returns:
        Rows of ``results.json``; the setting that the specification gives is marked ``"configured": true``. The bound
        beside each time is that of an exact search, which an index may pass.
    """
    from lightning_fot.config.retriever import layer_spec
    from lightning_fot.retrievers.registry import create_retriever

    label = retriever_label(spec)
    rows: list[dict[str, Any]] = []
    for number in capture.lm.memory_layers:
        layer, queries = capture.layer(number)
        keys = layer.keys.flatten(0, 1)
        own = layer_spec(spec, number)
        retriever = create_retriever(own, keys.shape[-1], keys.shape[0])
        configured = {name: getattr(retriever, name) for name in retriever.query_args}
        grid = DEFAULT_QUERY_GRIDS.get(retriever_label(own), []) if config.query_grid is None else config.query_grid
        # Whole settings, since each stays until it is changed; a grid for one backend says nothing to another, such as
        # to exact search beside it.
        grid = [{**configured, **setting} for setting in grid if setting.keys() <= set(retriever.query_args)]
        grid = grid if configured in grid else [configured, *grid]
        past = capture.past.get(number)
        measured = measure_retriever(
            own,
            keys,
            sample_rows(queries, config.retrieval_queries),
            past_queries=torch.cat(past, dim=1) if past else None,
            k=capture.lm.config.top_k,
            scale=capture.lm.attachment.attention_scale(number),
            softcap=capture.lm.attachment.softcap(number),
            query_grid=grid,
            repeats=config.retrieval_repeats,
        )
        size = int(measured[0]["batch"])
        banks, count, dim = keys.shape
        limit = scan_limit(banks, count, dim, size, scanned_bytes(dim, 4, size, keys.device), keys.device)
        for setting, row in zip(grid, measured, strict=True):
            mark = {"configured": True} if setting == configured else {}
            bound = limit.beside(row["search_ms_p50"] / 1e3)
            rows.append({"layer": number, **row, "retriever": label, **bound, **mark})
        if advance is not None:
            advance(1 / len(capture.lm.memory_layers))
    return rows


def measure_live(
    lm: MemoryLM, number: int, layer: BaseLayer, queries: Tensor, repeats: int, sinks: bool = True
) -> dict[str, Any]:
    """Quality and speed of the very retriever that a memory layer searches.

    Args:
        lm: The model.
        number: The layer.
        layer: Its memory.
        queries: (B·G, Q, D), as the layer searches with them.
        repeats: Timed calls; 0 leaves out what only they tell: times and QPS.
        sinks: Whether the memory was filled with whole windows, so that it is known where they start.

    Returns:
        A row: the fields of ``results.json`` retrieval rows, those of :class:`RetrievalQuality`, and counters.
    """
    stats = layer.retriever.stats()
    k = lm.config.top_k
    quality = live_quality(lm, number, layer, queries, sinks)
    searched = layer.retriever.stats()
    asked = _by_bank(layer, queries)
    timed: dict[str, float] = {}
    if repeats:
        times = SearchTimes.from_seconds(
            time_calls(lambda: layer.search(asked, k), repeats, queries.device), queries.shape[0] * queries.shape[1]
        )
        timed = {
            "search_ms_p50": times.p50_ms,
            "search_ms_p95": times.p95_ms,
            "search_ms_p99": times.p99_ms,
            "qps": times.qps,
        }
    return {
        "layer": number,
        "memory_tokens": max(layer.lengths),
        "k": k,
        **quality.as_dict(),
        **timed,
        "add_s": stats.add_seconds,
        "build_s": stats.build_seconds,
        "bytes": layer.nbytes,
        "indexed_share": layer.indexed_share,
        "rows_scanned": (searched.rows_scanned - stats.rows_scanned) / quality.queries,
        "fallbacks": layer.retriever.stats().fallbacks,
        "rebuilds": stats.rebuilds,
    }


def live_quality(lm: MemoryLM, number: int, layer: BaseLayer, queries: Tensor, sinks: bool = False) -> RetrievalQuality:
    """What a memory layer finds for queries (B·G, Q, D), against exact search over its keys: see `measure_live`."""
    config = lm.config
    rows = layer.search(_by_bank(layer, queries), config.top_k).flatten(0, 1)
    # Windows that keep sinks or an overlap do not begin at whole windows, and dropped pairs shift the others.
    known = sinks and config.capacity is None and not config.overlap and not config.sink_tokens
    starts = window_starts(max(layer.lengths), config.window - config.skip_window_start) if known else None
    scale, softcap = lm.attachment.attention_scale(number), lm.attachment.softcap(number)
    return retrieval_quality(layer, queries, rows, scale=scale, softcap=softcap, sink_rows=starts)


def _by_bank(layer: BaseLayer, queries: Tensor) -> Tensor:
    """(B·G, Q, D) → (B, G, Q, D)."""
    return queries.reshape(layer.batch_size, layer.kv_heads, *queries.shape[1:])


def quality_in_run(capture: Capture, label: str, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Rows of :func:`measure_live` for the memory that perplexity was measured with."""
    rows = []
    for number in capture.lm.memory_layers:
        layer, queries = capture.layer(number)
        sample = sample_rows(queries, config.retrieval_queries)
        row = measure_live(capture.lm, number, layer, sample, config.retrieval_repeats)
        rows.append({"retriever": label, **row})
    return rows
