"""The index cells of a sweep: each is one build, asked with all its query settings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fot.bench.measure import (
    BuiltRetriever,
    Truth,
    layer_of,
    load_metadata,
    load_qk,
    scale_of,
    softcap_of,
    times,
)
from lightning_fot.evaluation.speed.limits import scan_limit, scanned_bytes
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.grid import Build, digest
from lightning_fot.sweep.settings import SweepConfig

_MOST_CALLS = 300
_TURNS = 3
_EXACT_CALLS = 10


@dataclass
class Recorded:
    """Keys and queries of one layer, its heads as banks.

    Args:
        name: Of the recording, what tells it from the others.
        layer: Number of the layer, or the name of a bank that tells none.
        keys: (banks, n, dim) float32.
        queries: (banks, q, dim) float32.
        past: (banks, p, dim) float32, or None.
        scale: Factor of the scores in the softmax; None means 1 / sqrt(dim).
        softcap: Soft cap of the scores in the softmax; None means none.
        identity: What the measurements depend on besides the settings of the sweep.
    """

    name: str
    layer: int | str
    keys: Tensor
    queries: Tensor
    past: Tensor | None
    scale: float | None
    softcap: float | None
    identity: str
    _truths: dict[tuple[int, int], Truth] = field(default_factory=dict)

    def newest(self, count: int) -> Tensor:
        """The keys that were read last, (banks, count, dim)."""
        return self.keys[:, self.keys.shape[1] - count :]

    def truth(self, count: int, k: int) -> Truth:
        """Exact neighbours among the newest keys; those of one size are kept."""
        if (count, k) not in self._truths:
            self._truths = {size: truth for size, truth in self._truths.items() if size[0] == count}
            self._truths[count, k] = Truth(self.newest(count), self.queries, k, self.scale, self.softcap)
        return self._truths[count, k]


def read_layers(file: Any, name: str, queries: int) -> list[Recorded]:
    """The layers of a recording.

    Args:
        file: ``.safetensors`` or ``.npz``.
        name: What to call it.
        queries: The most queries a head to measure with.

    Raises:
        SettingError: The file holds no keys and queries.
    """
    metadata = load_metadata(file)
    groups: dict[int | str, list[dict[str, Tensor]]] = {}
    forms: dict[int | str, tuple[float | None, float | None]] = {}
    for bank, tensors in load_qk(file).items():
        number = layer_of(bank)
        key = bank if number is None else number
        groups.setdefault(key, []).append(tensors)
        forms[key] = scale_of(bank, metadata), softcap_of(bank, metadata)
    found = []
    for layer, heads in groups.items():
        past = [head["past_queries"] for head in heads if "past_queries" in head]
        joined = {kind: torch.cat([head[kind] for head in heads]) for kind in ("keys", "queries")}
        # Keys may come from anywhere: what is measured depends on their numbers.
        sums = [joined[kind].double().sum(dim=(1, 2)).tolist() for kind in ("keys", "queries")]
        identity = digest([layer, list(joined["keys"].shape), list(joined["queries"].shape), sums])
        found.append(
            Recorded(
                name,
                layer,
                joined["keys"],
                joined["queries"][:, :queries],
                torch.cat(past) if len(past) == len(heads) else None,
                *forms[layer],
                identity,
            )
        )
    return found


@dataclass(frozen=True)
class IndexCell:
    """One index over the newest keys of a layer.

    Args:
        recorded: Keys and queries.
        build: The index, and what it is asked with.
        memory_tokens: Keys a head.
        config: Numbers of neighbours, batches and repeats.
    """

    recorded: Recorded
    build: Build
    memory_tokens: int
    config: SweepConfig

    @property
    def key(self) -> str:
        """Name of its file. Query settings, k and batches may be added later: they do not change it."""
        return digest([self.recorded.identity, self.build.spec, self.memory_tokens, self.recorded.queries.shape[1]])

    @property
    def label(self) -> str:
        """For the screen."""
        words = [f"layer {self.recorded.layer}", f"{self.memory_tokens:,} keys", self.build.label]
        return ", ".join([self.recorded.name, *words] if self.recorded.name else words)

    @property
    def cost(self) -> float:
        """Rough work, to tell how much is left."""
        settings = len(self.build.query) * len(self.config.top_k) * len(self.config.batch)
        return float(self.memory_tokens * self.recorded.keys.shape[0]) * (1 + 0.2 * settings)

    def missing(self, cell: Mapping[str, Any] | None) -> list[tuple[dict[str, Any], int, int]]:
        """Query settings, k and batches that the cell does not have yet."""
        done = {_row_key(row["query"], row["k"], row["batch"]) for row in (cell or {}).get("rows", [])}
        wanted = [(q, k, b) for q in self.build.query for k in self.config.top_k for b in self.config.batch]
        return [one for one in wanted if _row_key(*one) not in done]

    def is_done(self, known: Mapping[str, Any] | None) -> bool:
        """Whether it has all that is asked for."""
        return not self.missing(known)

    def do(self, folder: SweepFolder, check: Callable[[], None]) -> None:
        """Measures what is missing in the folder, and keeps it there; see :meth:`measure`."""
        self.measure(folder.read(self.key), partial(folder.write, self.key), check)

    def measure(
        self, cell: Mapping[str, Any] | None, keep: Callable[[dict[str, Any]], None], check: Callable[[], None]
    ) -> None:
        """Builds the index once and measures what is missing.

        Args:
            cell: What is known already.
            keep: Called with the whole cell after each query setting.
            check: Called between settings; what it raises loses nothing.
        """
        rows: list[dict[str, Any]] = list((cell or {}).get("rows", []))
        missing = self.missing(cell)
        if not missing:
            return
        began = time.perf_counter() - float((cell or {}).get("seconds", 0.0))
        recorded = self.recorded
        built = BuiltRetriever(self.build.spec, recorded.newest(self.memory_tokens), recorded.past, missing[0][1])
        exact = None
        if self.build.spec["name"] != "exact":
            exact = BuiltRetriever("exact", recorded.newest(self.memory_tokens), None, missing[0][1])
        own = {name: getattr(built.retriever, name) for name in built.retriever.query_args}
        for setting, k in dict.fromkeys((json.dumps(q, sort_keys=True), k) for q, k, _ in missing):
            check()
            query = json.loads(setting)
            built.k = k
            built.set({**own, **query})
            found = built.search(recorded.queries)
            scores = recorded.truth(self.memory_tokens, k).score(found)
            head = {**built.facts(), **scores.means(), "recall_worst_head": scores.worst_recall()}
            for batch in [b for q, other, b in missing if q == query and other == k]:
                rows.append(
                    {**self._facts(), **head, "query": query, "batch": batch, **self._times(built, exact, batch)}
                )
            seconds = time.perf_counter() - began
            keep({"settings": {**self._facts(), "spec": self.build.spec}, "rows": rows, "seconds": seconds})

    def _times(self, built: BuiltRetriever, exact: BuiltRetriever | None, batch: int) -> dict[str, Any]:
        """Times of calls, in turns with exact search: a machine that is busy for a while slows both."""
        queries = self.recorded.queries
        calls = min(_MOST_CALLS, self.config.repeats * max(1, queries.shape[1] // batch))
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(_TURNS):
            ours += built.time(queries, math.ceil(calls / _TURNS), batch)
            if exact is not None:
                exact.k = built.k
                theirs += exact.time(queries, min(math.ceil(calls / _TURNS), _EXACT_CALLS), batch)
        found: dict[str, Any] = dict(times(ours, queries.shape[0] * batch))
        banks, _, dim = queries.shape
        limit = scan_limit(
            banks, self.memory_tokens, dim, batch, scanned_bytes(dim, 4, batch, queries.device), queries.device
        )
        found |= limit.beside(found["search_ms_p50"] / 1e3)
        if theirs:
            found["exact_ms_p50"] = times(theirs, queries.shape[0] * batch)["search_ms_p50"]
        return found

    def _facts(self) -> dict[str, Any]:
        words = self.build.label.partition(" ")[2]
        return {
            "recording": self.recorded.name,
            "layer": self.recorded.layer,
            "memory_tokens": self.memory_tokens,
            "banks": self.recorded.keys.shape[0],
            "dim": self.recorded.keys.shape[2],
            "build": words,
        }

    def wanted(self, cell: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Rows of the cell that this sweep asks for."""
        asked = {_row_key(q, k, b) for q in self.build.query for k in self.config.top_k for b in self.config.batch}
        return [row for row in (cell or {}).get("rows", []) if _row_key(row["query"], row["k"], row["batch"]) in asked]


def index_cells(recorded: Sequence[Recorded], builds: Sequence[Build], config: SweepConfig) -> list[IndexCell]:
    """All cells, those of the same keys side by side.

    A recording that was made for the sweep may hold fewer keys than tokens were asked for, as where the first of each
    window are not kept: sizes beyond it become all that there is.

    Raises:
        SettingError: More keys are asked for than a given file holds.
    """
    from lightning_fot.errors import SettingError

    cells = []
    for layer in recorded:
        stored = layer.keys.shape[1]
        sizes = config.memory_tokens or [stored]
        if config.keys is not None and max(sizes) > stored:
            raise SettingError(
                "sweep.memory_tokens", max(sizes), f"is more than the {stored} keys recorded", "Record more keys."
            )
        for size in dict.fromkeys(min(size, stored) for size in sizes):
            cells += [IndexCell(layer, build, size, config) for build in builds]
    return cells


def _row_key(query: Mapping[str, Any], k: int, batch: int) -> str:
    return json.dumps([dict(sorted(query.items())), k, batch])
