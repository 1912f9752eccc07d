"""Section b: one token with a filled memory, against a full key-value cache and against what bandwidth allows."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from support.bench import Bench, Fills
from support.report import Row, table
from support.rivals import ROOM, FullCache, greedy
from support.timing import GIB, Stamps, available_bytes, bandwidth, fits, interleave, ratio

from lightning_fot.evaluation.measures.retrieval import retrieval_quality
from lightning_fot.retrievers.base import Retriever

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot import Memory
    from lightning_fot.model.lm import MemoryLM

TITLE = "b. One token with {} tokens in memory (aim at 131072: 10 times faster than a full cache)"
NOTES = """\
  dynamic, static: full KV cache of transformers over this method, medians of ratios; dynamic copies the cache for each
    token, static writes in place. * extrapolated in a straight line from the two longest caches that were measured.
  limit: (bare step + bytes of all keys in memory / read bandwidth) over this method; an index may pass 1.
  rest: what is neither the bare step nor the search: gathering, merging, Python. move: share of moving the window.
  mass: softmax mass over the whole memory that the found pairs hold; mass_r: over that of the exact top k."""
COLUMNS = {
    "method": "method",
    "ms": "ms",
    "search_ms": "search",
    "rest_ms": "rest",
    "move_ms": "move",
    "over_dynamic": "dynamic",
    "over_static": "static",
    "mark": "",
    "limit": "limit",
    "recall": "recall",
    "mass_recall": "mass_r",
    "mass": "mass",
    "indexed": "indexed",
    "fallbacks": "fallb.",
    "build_s": "build s",
    "index_bytes": "index B/tok",
}


@contextmanager
def searches_timed() -> Iterator[list[float]]:
    """Adds up, in the one number that it gives, the seconds of all searches inside the block."""
    plain, spent = Retriever.search, [0.0]

    @wraps(plain)
    def search(self: Retriever, queries: Tensor, k: int) -> Tensor:
        began = time.perf_counter()
        try:
            return plain(self, queries, k)
        finally:
            spent[0] += time.perf_counter() - began

    Retriever.search = search  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Retriever.search = plain  # type: ignore[method-assign]


class Decoding:
    """Measures size by size, and remembers what full caches took.

    Args:
        bench: Settings, models and text.
        lm: The attached model.
    """

    def __init__(self, bench: Bench, lm: MemoryLM) -> None:
        self.bench = bench
        self.lm = lm
        self.explained = False
        # A prompt that leaves room: the window does not move while steps are timed.
        self.prompt = bench.next_ids[:, : bench.settings.window // 4]
        self.tokens = min(ROOM - 8, 6 if bench.settings.quick else 16)
        self.rival_tokens = 3 if bench.settings.quick else 5
        self.full: dict[str, dict[int, float]] = {"dynamic": {}, "static": {}}
        self.bytes_a_second = bandwidth(bench.settings.quick)
        bench.report.progress(f"b: this machine reads {self.bytes_a_second / 1e9:.1f} GB/s")

    def measure(self, fills: Fills, size: int) -> list[Row]:
        """Rows of one size: the bare step, full caches, and every retriever."""
        report, names = self.bench.report, list(fills.memories)
        searching: dict[str, list[float]] = {name: [] for name in names}
        methods: dict[str, Callable[[], float]] = {"bare": self._bare}
        for name in names:
            methods[name] = partial(self._with_memory, fills.memories[name], searching[name])
        rivals = self._rivals(size)
        for kind, cache in rivals.items():
            methods[kind] = partial(self._full, cache, kind)
        report.progress(f"b: {size} tokens, {self.bench.settings.repeats} rounds of {', '.join(methods)}")
        seconds = interleave(methods, self.bench.settings.repeats)
        for kind in rivals:
            self.full[kind][size] = statistics.median(seconds[kind])
        cache = methods = rivals = {}  # type: ignore[assignment]
        bare = statistics.median(seconds["bare"])
        rows = [self._rival_row(kind, size, bare, seconds) for kind in ("dynamic", "static")]
        for name in names:
            report.progress(f"b: recall of {name} at {size}")
            rows.append(self._row(name, fills, size, seconds, searching[name]))
        first = {"tokens": size, "method": "bare step", "ms": 1e3 * bare, "bytes_a_second": self.bytes_a_second}
        rows = [first, *rows]
        self.bench.report.add("b", rows)
        table(TITLE.format(size), COLUMNS, rows)
        self._explain()
        return rows

    def bf16_rival(self, size: int) -> Row:
        """A bf16 backbone with a full bf16 cache: half the bytes, where the processor computes in bf16 at all."""
        self.bench.report.progress(f"b: full cache of {size} in bfloat16")
        model = torch.nn.Module.to(copy.deepcopy(self.bench.bare), torch.bfloat16)
        need = FullCache.nbytes(model, size) + FullCache.nbytes(self.bench.bare, size)
        if not fits(need):
            return {"tokens": size, "method": "bf16 static over fp32 static", "skipped": f"needs {need / GIB:.1f} GiB"}
        low, full = FullCache(model, size), FullCache(self.bench.bare, size)
        seconds = interleave({"bf16": lambda: self._full(low, "static"), "fp32": lambda: self._full(full, "static")}, 2)
        found = ratio(seconds, "bf16", "fp32")
        verdict = "a fair rival" if found.median < 1 else "no fair rival: slower than fp32 on this processor"
        print(
            f"  bf16 static cache over fp32 static cache at {size} tokens: {found.median:.2f}: {verdict}\n", flush=True
        )
        row = {"tokens": size, "method": "bf16 static over fp32 static", **found.as_dict("ratio")}
        self.bench.report.add("b", [row])
        return row

    def _explain(self) -> None:
        """Says once what the columns mean."""
        if not self.explained:
            print(NOTES, "\n", flush=True)
        self.explained = True

    def _bare(self) -> float:
        return statistics.median(greedy(self.bench.bare, self.prompt, self.tokens, Stamps()).steps())

    def _full(self, cache: FullCache, kind: str) -> float:
        return statistics.median(cache.steps(kind, int(self.prompt[0, -1]), self.rival_tokens))

    def _with_memory(self, memory: Memory, searching: list[float]) -> float:
        """Seconds of a step; what searches took of it goes to ``searching``."""
        with searches_timed() as spent:
            stamps = greedy(self.lm, self.prompt, self.tokens, Stamps(lambda: spent[0]), memory=memory)
        searching.append(statistics.median(stamps.probed_steps()))
        return statistics.median(stamps.steps())

    def _rivals(self, size: int) -> dict[str, FullCache]:
        need = FullCache.nbytes(self.bench.bare, size + ROOM)
        if not fits(need):
            self.bench.report.progress(
                f"b: a full cache of {size} tokens takes {need / GIB:.1f} GiB, {available_bytes() / GIB:.1f} are free"
            )
            return {}
        # The dynamic cache copies; both live at once.
        kinds = ("dynamic", "static") if fits(2 * need) else ("static",)
        cache = FullCache(self.bench.bare, size)
        return dict.fromkeys(kinds, cache)

    def _extrapolated(self, kind: str, size: int, bare: float) -> float | None:
        """Seconds of a step with a full cache, on the line through the two longest that were measured."""
        points = sorted({0: bare, **self.full[kind]}.items())[-2:]
        if len(points) < 2:
            return None
        (x0, y0), (x1, y1) = points
        return y1 + (y1 - y0) / (x1 - x0) * (size - x1)

    def _rival_row(self, kind: str, size: int, bare: float, seconds: dict[str, list[float]]) -> Row:
        row: Row = {"tokens": size, "method": f"full cache, {kind}", "extrapolated": kind not in seconds}
        taken = self.full[kind].get(size) or self._extrapolated(kind, size, bare)
        if taken is None:
            return row
        need = FullCache.nbytes(self.bench.bare, size)
        limit = (bare + need / self.bytes_a_second) / taken
        return {**row, "ms": 1e3 * taken, "limit": limit, "cache_bytes": need, "mark": "*" * row["extrapolated"]}

    def _row(self, name: str, fills: Fills, size: int, seconds: dict[str, list[float]], searching: list[float]) -> Row:
        memory = fills.memories[name]
        step, bare = statistics.median(seconds[name]), statistics.median(seconds["bare"])
        search = statistics.median(searching)
        row: Row = {
            "tokens": size,
            "method": name,
            "ms": 1e3 * step,
            "search_ms": 1e3 * search,
            "rest_ms": 1e3 * (step - bare - search),
            "move_ms": 1e3 * self._move(memory, step),
            "mark": "",
        }
        for kind in ("dynamic", "static"):
            if kind in seconds:
                row |= ratio(seconds, kind, name).as_dict(f"over_{kind}")
            elif (taken := self._extrapolated(kind, size, bare)) is not None:
                row |= {f"over_{kind}": taken / step, "mark": "*"}
        keys = sum(layer.keys[0].numel() * memory.shape.dtype.itemsize for layer in memory.layers.values())
        retrievers = [layer.retriever for layer in memory.layers.values()]
        covered = sum(int(retriever.indexed.sum()) for retriever in retrievers)
        return {
            **row,
            "limit": (bare + keys / self.bytes_a_second) / step,
            "key_bytes": keys,
            **self._quality(memory),
            "indexed": covered / sum(int(retriever.lengths.sum()) for retriever in retrievers),
            "fallbacks": sum(retriever.stats().fallbacks for retriever in retrievers),
            "build_s": fills.build_seconds[name],
            "index_bytes": sum(retriever.nbytes for retriever in retrievers) / len(memory),
        }

    def _move(self, memory: Memory, step: float) -> float:
        """Seconds a token that moving the local window takes: one move, shared by the tokens until the next."""
        window = self.bench.settings.window
        prompt = self.bench.next_ids[:, : window - 4]
        stamps = greedy(self.lm, prompt, 10, Stamps(), memory=memory)
        return max(0.0, max(stamps.steps()) - step) / (window // 2)

    def _quality(self, memory: Memory) -> Row:
        """Recall and mass of real decoding queries in this memory, means over layers."""
        found: list[dict[str, Any]] = []
        with self.lm.record_queries() as recorded:
            greedy(self.lm, self.prompt, self.tokens, Stamps(), memory=memory)
        for number, layer in memory.layers.items():
            queries: Tensor = torch.cat(recorded[number], dim=1)
            asked = queries.reshape(layer.batch_size, layer.kv_heads, *queries.shape[1:])
            rows = layer.search(asked, self.lm.config.top_k).flatten(0, 1)
            keys = layer.keys.flatten(0, 1)
            scale, softcap = self.lm.attachment.attention_scale(number), self.lm.attachment.softcap(number)
            quality = retrieval_quality(keys, queries, rows, scale=scale, softcap=softcap)
            found.append(quality.as_dict())
        return {name: statistics.mean(part[name] for part in found) for name in ("recall", "mass_recall", "mass")}
