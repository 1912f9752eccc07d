"""A memory layer whose pairs lie in shards.

What it holds is a value: versions of shards, and which of them has which pairs. So a snapshot, a mark and a choice to
go back are free, and a change that fails leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.found import Attended, Found, Retrieved, Scoring
from lightning_fot.shards.asking import Asking, Held
from lightning_fot.shards.attention import winners
from lightning_fot.shards.group import Group
from lightning_fot.shards.packing import pack, unpack
from lightning_fot.shards.placement import Row, emptiest
from lightning_fot.shards.retriever import ShardedRetriever
from lightning_fot.shards.shard import LayerShape

# Fewer new pairs of a row than this are not cut.
_LEAST_PIECE = 1024


class ShardedLayer(BaseLayer):
    """Pairs of one memory layer, shared out over shards.

    Args:
        group: The shards.
        shape: Of the layer.
        device: Where answers are wanted.
        held: What it begins with; None is nothing.
    """

    def __init__(self, group: Group, shape: LayerShape, device: torch.device, held: Held | None = None) -> None:
        self.group, self.shape, self.device = group, shape, device
        self.batch_size, self.kv_heads = shape.batch_size, shape.kv_heads
        self.key_dim, self.value_dim = shape.key_dim, shape.value_dim
        self._waiting: list[tuple[int, Future[bool]]] = []
        self._retriever = ShardedRetriever(self.shape.kind, self.told, self._flush)
        self.held = self._nothing() if held is None else held

    def _nothing(self) -> Held:
        made = [self.group.make(shard, None, "empty", self.shape) for shard in range(self.group.count)]
        versions = tuple(version for version, _ in made)
        rows = tuple(Row() for _ in range(self.batch_size))
        return Held(versions, rows, (0,) * self.batch_size, tuple(object() for _ in versions))

    @property
    def retriever(self) -> ShardedRetriever:
        return self._retriever

    @property
    def codings(self) -> tuple[object | None, ...]:
        return self.held.codings if self.shape.dtype == "int8" else ()

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.held.rows]

    @property
    def keys(self) -> Tensor:
        return self._whole(0)

    @property
    def values(self) -> Tensor:
        return self._whole(1)

    def _whole(self, which: int) -> Tensor:
        held = self.held
        rows = []
        for number, row in enumerate(held.rows):
            calls, ends = [], dict[int, int]()
            for shard, count in row.runs:
                start = ends.get(shard, 0)
                ends[shard] = start + count
                calls.append((shard, start, start + count))
            parts = self._stretches(held, number, calls, keys_only=not which)
            dim = self.value_dim if which else self.key_dim
            empty = torch.zeros(self.kv_heads, 0, dim, dtype=self._float_dtype)
            rows.append(torch.cat([part[which] for part in parts], dim=1) if parts else empty)
        longest = max(row.shape[1] for row in rows)
        padded = [torch.cat([row, row.new_zeros(self.kv_heads, longest - row.shape[1], row.shape[2])], 1)
                  for row in rows]  # fmt: skip
        return torch.stack(padded).to(self.device)

    @property
    def _float_dtype(self) -> torch.dtype:
        return torch.float32 if self.shape.dtype == "int8" else getattr(torch, self.shape.dtype)

    def _stretches(
        self, held: Held, row: int, calls: Sequence[tuple[int, int, int]], keys_only: bool
    ) -> list[list[Tensor]]:
        """Keys and values (G, n, D) of each stretch: what a shard holds of the row is asked for as a whole, and cut."""
        bounds: dict[int, tuple[int, int]] = {}
        for shard, start, stop in calls:
            low, high = bounds.get(shard, (start, stop))
            bounds[shard] = min(low, start), max(high, stop)
        asked = {
            shard: self.group.ask(shard, "stretch", held.versions[shard].number, row, low, high, keys_only)
            for shard, (low, high) in bounds.items()
        }
        found = {shard: [unpack(one) for one in self.group.answer(call)] for shard, call in asked.items()}
        return [
            [part[:, start - bounds[shard][0] : stop - bounds[shard][0]] for part in found[shard]]
            for shard, start, stop in calls
        ]

    def key_blocks(self, bank: int, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        held = self.held
        number, head = divmod(bank, self.kv_heads)
        row = held.rows[number]
        for start in range(0, row.length, size):
            numbers = torch.arange(start, min(row.length, start + size))
            shards, places = row.places(numbers)
            keys = torch.zeros(len(numbers), self.key_dim, dtype=self._float_dtype)
            for shard in set(shards.flatten().tolist()):
                mine = shards == shard
                first, last = int(places[mine][0]), int(places[mine][-1]) + 1
                (part,) = self._stretches(held, number, [(shard, first, last)], keys_only=True)
                keys[mine] = part[0][head]
            yield start, keys.to(self.device)

    @property
    def nbytes(self) -> int:
        return sum(told["nbytes"] for told in self.told())

    @property
    def indexed_share(self) -> float:
        told = self.told()
        return sum(sum(one["indexed"]) for one in told) / max(1, sum(sum(one["stored"]) for one in told))

    def told(self) -> list[dict[str, Any]]:
        """What each shard says of its slice."""
        held = self.held
        return self.group.answers(
            [self.group.ask(shard, "told", version.number) for shard, version in enumerate(held.versions)]
        )

    def _flush(self) -> None:
        held = self.held
        self.group.answers(
            [self.group.ask(shard, "flush", version.number) for shard, version in enumerate(held.versions)]
        )

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        start = perf_counter()
        width = keys.shape[2]
        counts = [width] * self.batch_size if lengths is None else lengths.tolist()
        size = max(_LEAST_PIECE, -(-width // self.group.count))
        for first in range(0, width, size):
            part = slice(first, min(width, first + size))
            piece = [max(0, min(count, part.stop) - first) for count in counts]
            if max(piece):
                self._append(keys[:, :, part], values[:, :, part], piece)
        self.retriever.added(perf_counter() - start)

    def _append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        held = self.held
        shard = emptiest(held.rows, self.group.count)
        # As they are stored, or in what they would be read in: no more bytes than need be travel, or wait here.
        sent = [pack(part.to(self._float_dtype)) for part in (keys, values)]
        self._change(shard, "append", *sent, torch.tensor(counts))
        rows = [row.plus(shard, count) for row, count in zip(held.rows, counts, strict=True)]
        self.held = replace(self.held, rows=tuple(rows))

    def _change(self, shard: int, name: str, *args: Any) -> None:
        version, done = self.group.make(shard, self.held.versions[shard], name, *args)
        self._waiting.append((shard, done))
        versions = list(self.held.versions)
        versions[shard] = version
        self.held = replace(self.held, versions=tuple(versions))

    def settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        error: BaseException | None = None
        anew = set[int]()
        for shard, done in waiting:
            try:
                if done.result():
                    anew.add(shard)
            except BaseException as wrong:
                error = error or wrong
        if error is not None:
            raise error
        if anew:
            codings = [object() if shard in anew else old for shard, old in enumerate(self.held.codings)]
            self.held = replace(self.held, codings=tuple(codings))

    def observe(self, queries: Tensor) -> None:
        if not self.retriever.learns:
            return
        held, sent = self.held, pack(queries.float())
        for shard, version in enumerate(held.versions):
            self.group.ask(shard, "observe", version.number, sent)

    def search(self, queries: Tensor, k: int) -> Tensor:
        held = self.held
        asking = Asking(self.group, held)
        if not asking.holders:
            return torch.full((*queries.shape[:3], k), -1, dtype=torch.int64, device=queries.device)
        sent = pack(queries.float())
        found = self.group.answers(
            [
                self.group.ask(shard, "nearest", held.versions[shard].number, sent, k, None, True)
                for shard in asking.holders
            ]
        )
        scores, local = [unpack(one[0]) for one in found], [unpack(one[1]) for one in found]
        _, best, places = winners(scores, k)
        rows = asking.numbered(local).gather(-1, places).masked_fill(best == -torch.inf, -1)
        missing = k - rows.shape[-1]
        return torch.nn.functional.pad(rows, (0, missing), value=-1).to(queries.device)

    def gather(self, rows: Tensor) -> Retrieved:
        held, wanted = self.held, rows.cpu()
        placed = [row.places(part.clamp_min(0)) if row.runs else (torch.full_like(part, -1), part)
                  for row, part in zip(held.rows, wanted, strict=True)]  # fmt: skip
        shards = torch.stack([shard for shard, _ in placed]).masked_fill(wanted < 0, -1)
        local = torch.stack([number for _, number in placed])
        keys = torch.zeros(*rows.shape, self.key_dim, dtype=self._float_dtype)
        values = torch.zeros(*rows.shape, self.value_dim, dtype=self._float_dtype)
        calls = []
        for shard in set(shards.flatten().tolist()):
            if shard >= 0:
                here = local.masked_fill(shards != shard, -1)
                calls.append((shard, self.group.ask(shard, "gather", held.versions[shard].number, pack(here))))
        for shard, call in calls:
            mine = shards == shard
            found = self.group.answer(call)
            keys[mine], values[mine] = (unpack(part)[mine] for part in found)
        return Retrieved(keys.to(rows.device), values.to(rows.device), rows >= 0, rows)

    def read(self, queries: Tensor, k: int, dense_pairs: int = 0, scoring: Scoring | None = None) -> Found | None:
        held = self.held
        stored = max(row.length for row in held.rows)
        shown = stored <= max(k, dense_pairs)
        if scoring is None or scoring.pairs or (shown and scoring.weights) or not stored:
            return super().read(queries, k, dense_pairs)
        start = perf_counter()
        wanted = (pack(queries.float()), scoring, None if shown else k, self.value_dim)
        found: Attended = self.group.twice(partial(Asking(self.group, held).attended, *wanted))
        self.retriever.searched(self.batch_size * self.kv_heads * queries.shape[2], perf_counter() - start)
        here = {name: None if part is None else part.to(queries.device) for name, part in vars(found).items()}
        return Attended(**here)  # type: ignore[arg-type]

    def drop_oldest(self, counts: Sequence[int]) -> None:
        found = [row.drop_oldest(count) for row, count in zip(self.held.rows, counts, strict=True)]
        for shard in range(self.group.count):
            gone = [of_shards.get(shard, 0) for _, of_shards in found]
            if any(gone):
                self._change(shard, "drop_oldest", gone)
        dropped = tuple(old + new for old, new in zip(self.held.dropped, counts, strict=True))
        self.held = replace(self.held, rows=tuple(row for row, _ in found), dropped=dropped)

    def keep(self, masks: Sequence[Tensor]) -> None:
        found = [row.keep(mask.cpu()) for row, mask in zip(self.held.rows, masks, strict=True)]
        for shard in range(self.group.count):
            own = [of_shards.get(shard, torch.ones(0, dtype=torch.bool)) for _, of_shards in found]
            self._change(shard, "keep", own)
        none = (0,) * self.batch_size
        self.held = replace(self.held, rows=tuple(row for row, _ in found), dropped=none)

    def pack(self) -> None:
        self.keep([torch.ones(length, dtype=torch.bool) for length in self.lengths])

    @property
    def unpacked(self) -> int:
        return max(self.held.dropped)

    def use_retriever(self, spec: RetrieverSpec) -> None:
        self.shape = replace(self.shape, spec=spec)
        for shard in range(self.group.count):
            self._change(shard, "use_retriever", spec)
        self._retriever = ShardedRetriever(self.shape.kind, self.told, self._flush)
        self.settle()

    def select_rows(self, rows: Sequence[int]) -> ShardedLayer:
        held, index = self.held, list(rows)
        made = [self.group.make(shard, version, "select_rows", index)[0] for shard, version in enumerate(held.versions)]
        chosen = Held(
            tuple(made), tuple(held.rows[row] for row in index), tuple(held.dropped[row] for row in index), held.codings
        )
        return ShardedLayer(self.group, replace(self.shape, batch_size=len(index)), self.device, chosen)

    def mark(self) -> Callable[[], None]:
        held = self.held

        def back() -> None:
            self.held, self._waiting = held, []

        return back

    def reset(self) -> None:
        self.held = self._nothing()

    def snapshot(self) -> ShardedLayer:
        return ShardedLayer(self.group, self.shape, self.device, self.held)

    def __reduce__(self) -> NoReturn:
        raise SettingError(
            "memory", f"{self.group.count} shards", "cannot be pickled: its pairs lie in other processes",
            "Save it with Memory.save.",
        )  # fmt: skip


def shards_of(layers: Mapping[int, BaseLayer]) -> dict[int, ShardedLayer]:
    """Layers of a memory that is shared out.

    Raises:
        TypeError: One is not.
    """
    own = {number: layer for number, layer in layers.items() if isinstance(layer, ShardedLayer)}
    if len(own) < len(layers):
        raise TypeError("layers of another place")
    return own
