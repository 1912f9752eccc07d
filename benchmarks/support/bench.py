"""What the sections share: settings, models, text, and memories filled to the same length."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from support.pairs import Pairs, library_ids
from support.report import Report
from support.timing import GIB, available_bytes, fits
from torch import Tensor

from lightning_fot import Memory, MemoryConfig, attach_memory
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rough: graph links or cells with a copy of the key, and what building takes besides.
_INDEX_BYTES_A_KEY = 600
_HEARTBEAT = 20.0


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    backbone: str
    sections: tuple[str, ...]
    tokens: tuple[int, ...]
    retrievers: tuple[str, ...]
    repeats: int
    threads: int
    layers: tuple[int, ...]
    window: int
    top_k: int
    dtype: str | None
    real_tokens: int
    noise: float
    quick: bool
    pairs: Path | None = None
    save_pairs: Path | None = None

    def as_row(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def config(self, window: int | None = None) -> MemoryConfig:
        """How memories are read: as in the shipped configurations."""
        return MemoryConfig(
            memory_layers=list(self.layers),
            window=window or self.window,
            top_k=self.top_k,
            skip_window_start=1,
            dtype=self.dtype,  # type: ignore[arg-type]
        )

    def retriever(self, name: str) -> dict[str, Any]:
        """Specification: the retriever's own defaults, except that small memories are indexed in a quick run."""
        return {"name": name, "min_index_size": 256} if self.quick else {"name": name}


class Bench:
    """Settings, report, models and text; each made when first used.

    Args:
        settings: What was asked for.
        report: Where rows go.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.report = report

    @cached_property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The model that gets the memory, and the bare backbone: two objects that share their weights."""
        self.report.progress(f"loading {self.settings.backbone}")
        model = load_backbone(self.settings.backbone)
        model.requires_grad_(False)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return model, copy.deepcopy(model, shared)

    @property
    def bare(self) -> PreTrainedModel:
        """The bare backbone."""
        return self.models[1]

    @contextmanager
    def attached(self, window: int | None = None) -> Iterator[MemoryLM]:
        """The backbone with its memory layers."""
        with attach_memory(self.models[0], self.settings.config(window)) as lm:
            yield lm

    @cached_property
    def ids(self) -> Tensor:
        """(1, n) tokens of real text: those that are recorded, and text that goes on after them."""
        tokenizer = load_tokenizer(self.settings.backbone)
        return library_ids(tokenizer, self.settings.real_tokens + 16 * self.settings.window)

    @property
    def next_ids(self) -> Tensor:
        """(1, n) tokens that no memory was filled with."""
        return self.ids[:, self.settings.real_tokens :]

    @cached_property
    def pairs(self) -> Pairs:
        """What memories are filled with."""
        asked = self.settings
        if asked.pairs is not None:
            pairs = Pairs.load(asked.pairs, asked.noise)
        else:
            began = time.perf_counter()
            with self.attached() as lm:
                pairs = Pairs.record(lm, self.ids[:, : asked.real_tokens], asked.noise)
            seconds = time.perf_counter() - began
            self.report.progress(f"recorded {pairs.recorded} pairs a head of real text in {seconds:.1f} s")
        if asked.save_pairs is not None:
            pairs.save(asked.save_pairs)
        return pairs


class Fills:
    """Memories of the same content, one for each retriever, grown from size to size.

    Args:
        bench: Settings and pairs.
        lm: The attached model.
        retrievers: Names.
    """

    def __init__(self, bench: Bench, lm: MemoryLM, retrievers: tuple[str, ...]) -> None:
        self.bench = bench
        self.lm = lm
        self.memories: dict[str, Memory] = {}
        self.build_seconds: dict[str, float] = {}
        for name in retrievers:
            memory = lm.new_memory(retriever=bench.settings.retriever(name))
            for number, layer in memory.layers.items():
                layer.retriever.observe(bench.pairs.queries[number])
            self.memories[name] = memory

    def grow(self, tokens: int) -> None:
        """Fills every memory to a length and builds its index; one that does not fit is left out from here on."""
        for name in list(self.memories):
            need = self._need(name, tokens)
            if not fits(need):
                self.bench.report.progress(
                    f"{name} at {tokens} tokens left out: it may need {need / GIB:.1f} GiB more, "
                    f"{available_bytes() / GIB:.1f} are free. Try --retrievers {name} alone."
                )
                del self.memories[name]
                continue
            self._grow(name, tokens)

    def _need(self, name: str, tokens: int) -> int:
        shape = self.lm.new_memory().shape
        heads = sum(shape.kv_heads)
        pair = sum(g * (d + v) for g, d, v in zip(shape.kv_heads, shape.head_dim, shape.value_dim, strict=True))
        # Growing buffers may hold twice what they need.
        index = 0 if name == "exact" else heads * _INDEX_BYTES_A_KEY
        return max(0, tokens - len(self.memories[name])) * (2 * pair * shape.dtype.itemsize + index)

    def _grow(self, name: str, tokens: int) -> None:
        memory, report = self.memories[name], self.bench.report
        began = time.perf_counter()
        for block in self.bench.pairs.blocks(len(memory), tokens):
            memory.append(block)
        added = time.perf_counter()
        with heartbeat(report, name, memory):
            memory.flush()
        self.build_seconds[name] = time.perf_counter() - added
        report.progress(
            f"{name}: {len(memory)} pairs a head, filled in {added - began:.1f} s, "
            f"index built in {self.build_seconds[name]:.1f} s"
        )


@contextmanager
def heartbeat(report: Report, name: str, memory: Memory) -> Iterator[None]:
    """Says every few seconds how much of an index is built."""
    done = threading.Event()
    began = time.perf_counter()

    def speak() -> None:
        while not done.wait(_HEARTBEAT):
            covered = torch.cat([layer.retriever.indexed for layer in memory.layers.values()])
            ready = int((covered >= len(memory)).sum())
            report.progress(f"{name}: {ready} of {len(covered)} banks indexed, {time.perf_counter() - began:.0f} s")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
