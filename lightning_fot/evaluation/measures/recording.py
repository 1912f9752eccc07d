"""Records keys and queries of real text, to measure and tune retrievers on without the model.

What is kept is what a memory would see: keys as they are stored, queries as they search. The windows read last are held
back: their queries are the ones to measure with, and the keys are those that were in memory before them, so that no
query looks for what comes after it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.system.tensor_files import save_tensors

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

# Queries to measure with come from several places of the text, however many one window has.
_LEAST_WINDOWS_HELD = 8
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RecordSettings:
    """How much is recorded.

    Args:
        tokens: Tokens read into the memory whose keys are kept.
        past: Past queries kept of each bank, spread over the text: what a query-aware map learns from.
        queries: Queries kept of each bank that come after the keys: what is measured with.
        dtype: ``float16`` or ``float32``, of the file.
        seed: Which queries are kept.

    Raises:
        SettingError: A value is out of its range.
    """

    tokens: int = 122_880
    past: int = 8192
    queries: int = 2048
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "past", "queries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(name, value, "must be a whole number of at least 1", "Correct it.")
        if self.dtype not in _DTYPES:
            raise SettingError("dtype", self.dtype, "is not known", f"Choose {' or '.join(_DTYPES)}.")


@dataclass
class _Window:
    """One window that was read: its queries (G, R·T, D) by layer, where they stand, and what was stored by then."""

    queries: dict[int, Tensor]
    first_place: int
    tokens: int
    stored: int


class Recording:
    """Reads documents with an attached model and keeps keys and queries of its memory layers.

    It may be saved after any window: what was read so far is divided in the same way as at the end.

    Args:
        lm: The model; its memory is searched exactly, whatever retriever it has.
        settings: How much to keep.

    Raises:
        SettingError: The model has no memory layers, or its memory would drop keys.
    """

    def __init__(self, lm: MemoryLM, settings: RecordSettings) -> None:
        config = lm.config
        if not lm.memory_layers:
            raise SettingError("model.memory.memory_layers", [], "leaves nothing to record", "Name a layer.")
        if config.capacity is not None:
            raise SettingError("model.memory.capacity", config.capacity, "drops keys", "Leave it out to record.")
        self.lm = lm
        self.settings = settings
        self.memory = lm.new_memory(1, retriever="exact")
        self.tokens = 0
        """Tokens read so far, those of the windows held back included."""
        facts = [lm.attachment.facts[layer] for layer in lm.memory_layers]
        a_window = config.window * min(fact.heads // fact.kv_heads for fact in facts)
        self.held_back = max(_LEAST_WINDOWS_HELD, math.ceil(settings.queries / a_window))
        self._held: deque[_Window] = deque()
        self._stored = 0
        self._past: dict[int, list[Tensor]] = {layer: [] for layer in lm.memory_layers}
        self._past_places: dict[int, list[Tensor]] = {layer: [] for layer in lm.memory_layers}
        self._generator = torch.Generator().manual_seed(settings.seed)

    @property
    def wanted(self) -> int:
        """Tokens to read in all."""
        return self.settings.tokens + self.held_back * self.lm.config.window

    @property
    def done(self) -> bool:
        """Whether enough was read."""
        return self.tokens >= self.wanted

    def read(self, input_ids: Tensor, advance: Callable[[int], None] = lambda tokens: None) -> None:
        """Reads a document, or as much of it as is still wanted.

        Args:
            input_ids: (1, T) int64; it begins a window.
            advance: Called with the tokens of each window; what it raises leaves a recording that can be saved.
        """
        config = self.lm.config
        left = max(0, self.wanted - self.tokens)
        first = True
        with self.lm.record_queries() as recorded:

            def after_window(tokens: int) -> None:
                nonlocal first
                # A window that moved keeps its sinks and its overlap in front of the new tokens.
                place = 0 if first else config.sink_tokens + config.overlap
                first = False
                queries = {layer: windows.pop() for layer, windows in recorded.items()}
                self._held.append(_Window(queries, place, tokens, len(self.memory)))
                self.tokens += tokens
                if len(self._held) > self.held_back:
                    self._let_go(self._held.popleft())
                advance(tokens)

            if left:
                self.lm.ingest(input_ids[:, :left], self.memory, progress=after_window)

    def _let_go(self, window: _Window) -> None:
        """Keeps a sample of the queries of a window that is past."""
        self._stored = window.stored
        count = math.ceil(self.settings.past * window.tokens / self.settings.tokens)
        for layer, queries in window.queries.items():
            kept, places = self._sample(queries, _places(window, queries), count)
            self._past[layer].append(kept)
            self._past_places[layer].append(places)

    def _sample(self, queries: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``count`` of the queries (G, Q, D) and of their places (Q,), the same ones in every bank, in order."""
        chosen = torch.randperm(len(places), generator=self._generator)[:count].sort().values
        return queries[:, chosen.to(queries.device)].cpu(), places[chosen]

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, for each KV head of each memory layer, ``L18h0`` being layer 18, head 0.

        Returns:
            ``<name>_keys`` (n, D), ``<name>_past_queries`` (p, D) and ``<name>_queries`` (q, D) in the dtype of the
            settings; ``<name>_past_positions`` (p,) and ``<name>_positions`` (q,) int32, the queries' places in their
            windows, by which they are rotated.

        Raises:
            SettingError: Less than two windows were read, or the dtype cannot hold what was recorded.
        """
        # Cut short before any window was let go: three quarters of what there is become keys.
        if not self._stored:
            kept = max(1, len(self._held) // 4)
            while len(self._held) > kept:
                self._let_go(self._held.popleft())
        if not self._stored or not self._held:
            raise SettingError(
                "tokens", self.tokens, f"are less than two windows of {self.lm.config.window}", "Read more text."
            )
        found: dict[str, Tensor] = {}
        for layer in self.lm.memory_layers:
            queries = torch.cat([window.queries[layer] for window in self._held], dim=1)
            places = torch.cat([_places(window, window.queries[layer]) for window in self._held])
            queries, places = self._sample(queries, places, self.settings.queries)
            past = torch.cat(self._past[layer], dim=1)
            keys = self.memory.layers[layer].keys[0, :, : self._stored]
            for head in range(len(keys)):
                name = f"L{layer}h{head}"
                found[f"{name}_keys"] = self._cast(name, keys[head])
                found[f"{name}_past_queries"] = self._cast(name, past[head])
                found[f"{name}_past_positions"] = torch.cat(self._past_places[layer]).clone()
                found[f"{name}_queries"] = self._cast(name, queries[head])
                found[f"{name}_positions"] = places.clone()
        return found

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        cast = tensor.detach().to("cpu", _DTYPES[self.settings.dtype]).contiguous().clone()
        if not bool(torch.isfinite(cast).all()):
            raise SettingError("dtype", self.settings.dtype, f"cannot hold {name}", "Record in float32.")
        return cast

    def metadata(self, model: str, text: str) -> dict[str, str]:
        """What belongs to the file, as JSON where it is no word.

        Args:
            model: Name of the backbone.
            text: Name of what was read.
        """
        config = self.lm.config
        values: dict[str, Any] = {
            "format": 1,
            "model": model,
            "text": text,
            "layers": list(self.lm.memory_layers),
            "tokens": self.tokens,
            "scale": {layer: self.lm.attachment.attention_scale(layer) for layer in self.lm.memory_layers},
            "softcap": {layer: self.lm.attachment.softcap(layer) for layer in self.lm.memory_layers},
            **{name: getattr(config, name) for name in ("window", "overlap", "sink_tokens", "skip_window_start")},
            "top_k": config.top_k,
            "positions": config.positions,
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    def save(self, path: Path, model: str, text: str) -> dict[str, Tensor]:
        """Writes the file as a whole or not at all; see :meth:`tensors` and :meth:`metadata`.

        Returns:
            What was written.

        Raises:
            SettingError: There is nothing to write, or the folder cannot be written.
        """
        tensors = self.tensors()
        try:
            # Its own name: a sweep tells by it whether another recording has got there.
            save_tensors(path, tensors, {**self.metadata(model, text), "file": path.name})
        except OSError as error:
            raise SettingError("record", str(path), f"cannot be written ({error})", "Choose another file.") from error
        return tensors


def _places(window: _Window, queries: Tensor) -> Tensor:
    """(R·T,) int32: places in their window of the queries of a group, its heads side by side."""
    return (window.first_place + torch.arange(queries.shape[1]) % window.tokens).to(torch.int32)
