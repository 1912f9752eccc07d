"""Section c: reading a text into a memory, against the bare backbone reading the same windows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from support.bench import Bench, Fills
from support.report import Row, table
from support.timing import interleave, product_rate, ratio, timed

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot import Memory
    from lightning_fot.model.lm import MemoryLM

TITLE = "c. Reading at {} tokens in memory, as share of the bare backbone's speed (aim: 0.9, exact and faiss_ivf)"
NOTES = """\
  model: model(window, use_cache=False, logits_to_keep=1); decoder: the same without the head, the stricter rival.
  upkeep: speed over the decoder's with the index's share: extending it, and building it anew as the memory doubles
    (scann: as it grows by half).
  limit: the decoder as far as the last memory layer and the exact search's matrix products alone, over the decoder."""
COLUMNS = {
    "method": "method",
    "tokens_per_s": "tokens/s",
    "over_model": "of model",
    "over_decoder": "of decoder",
    "over_decoder_q1": "q1",
    "over_decoder_q3": "q3",
    "with_upkeep": "upkeep",
    "limit": "limit",
}


class Reading:
    """Measures fill by fill.

    Args:
        bench: Settings, models and text.
        lm: The attached model.
    """

    def __init__(self, bench: Bench, lm: MemoryLM) -> None:
        self.bench = bench
        self.lm = lm
        self.explained = False
        window = bench.settings.window
        self.first = bench.next_ids[:, :window]
        self.ids = bench.next_ids[:, window : window * (3 if bench.settings.quick else 5)]

    def measure(self, fills: Fills, size: int) -> list[Row]:
        """Rows of one fill level: the bare backbone twice, and every retriever."""
        names = list(fills.memories)
        decoder = cast(Any, self.bench.bare).get_decoder()
        methods: dict[str, Callable[[], float]] = {
            "model": timed(lambda: [self.bench.bare(w, use_cache=False, logits_to_keep=1) for w in self._windows()]),
            "decoder": timed(lambda: [decoder(input_ids=w, use_cache=False) for w in self._windows()]),
        }
        for name in names:
            methods[name] = partial(self._ingest, fills.memories[name], self.ids)
        self.bench.report.progress(f"c: {size} tokens, {self.bench.settings.repeats} rounds of {', '.join(methods)}")
        seconds = interleave(methods, self.bench.settings.repeats)
        count = self.ids.shape[1]
        rows: list[Row] = [
            {"tokens": size, "method": f"bare {name}", "tokens_per_s": count / statistics.median(seconds[name])}
            for name in ("model", "decoder")
        ]
        alone = statistics.median(seconds["decoder"])
        for name in names:
            taken = statistics.median(seconds[name])
            row: Row = {
                "tokens": size,
                "method": name,
                "tokens_per_s": count / taken,
                **ratio(seconds, "model", name).as_dict("over_model"),
                **ratio(seconds, "decoder", name).as_dict("over_decoder"),
            }
            if size and name != "exact":
                upkeep = count * self._upkeep(name, fills)
                row |= {
                    "with_upkeep": row["over_decoder"] * taken / (taken + upkeep),
                    "upkeep_s_per_token": upkeep / count,
                }
            if name == "exact":
                row["limit"] = alone / (alone * self._depth() + self._search_seconds(size))
            rows.append(row)
        self.bench.report.add("c", rows)
        table(TITLE.format(size), COLUMNS, rows)
        self._explain()
        return rows

    def _explain(self) -> None:
        """Says once what the columns mean."""
        if not self.explained:
            print(NOTES, "\n", flush=True)
        self.explained = True

    def _windows(self) -> tuple[Tensor, ...]:
        return torch.split(self.ids, self.bench.settings.window, dim=1)

    def _ingest(self, memory: Memory, ids: Tensor) -> float:
        # The first window of a copy may have to copy buffers, once; a memory that goes on does not.
        copied = memory.snapshot()
        self.lm.ingest(self.first, memory=copied)
        began = time.perf_counter()
        self.lm.ingest(ids, memory=copied)
        return time.perf_counter() - began

    def _upkeep(self, name: str, fills: Fills) -> float:
        """Seconds a token that the index takes besides: extending it, and a build at each doubling."""
        memory = fills.memories[name]
        retrievers = [layer.retriever for layer in memory.layers.values()]
        if not all(getattr(retriever, "incremental", True) for retriever in retrievers):
            return fills.build_seconds[name] / (len(memory) / 3)
        before = len(memory)
        self.lm.ingest(self.ids, memory=memory)
        began = time.perf_counter()
        memory.flush()
        extending = (time.perf_counter() - began) / (len(memory) - before)
        return extending + fills.build_seconds[name] / (before / 2)

    def _depth(self) -> float:
        """Share of the decoder's layers that reading into memory computes."""
        return self.lm.memory_layers[-1] / len(self.lm.attachment.attentions)

    def _search_seconds(self, size: int) -> float:
        """Matrix products of exact searches alone: all memory layers but the last, which only stores."""
        if not size:
            return 0.0
        total = 0.0
        for number in self.lm.memory_layers[:-1]:
            facts = self.lm.attachment.facts[number]
            queries = self.ids.shape[1] * facts.heads
            rate = product_rate(min(queries, 1024), min(size, 65536), facts.head_dim)
            total += 2 * queries * size * facts.head_dim / rate
        return total
