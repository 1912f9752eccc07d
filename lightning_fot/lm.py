"""A language model with a memory attached: reading input of any length, and training on crossbatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_fot.backbone import Attachment
from lightning_fot.cache import MemoryCache
from lightning_fot.config import MemoryConfig
from lightning_fot.crossbatch import RowTable
from lightning_fot.errors import SettingError
from lightning_fot.generation import forward_cached, generate
from lightning_fot.inputs import beyond, tokens_first
from lightning_fot.memory import Memory, MemoryShape
from lightning_fot.passes import CollectPass, CrossbatchPass, WindowPass
from lightning_fot.persistence import fingerprint, load_memory

Progress = bool | Callable[[int], None]


class MemoryLMOutput(CausalLMOutputWithPast):
    """Output of transformers with the memory after reading in ``memory`` (not an entry of the tuple)."""

    memory: Memory


class MemoryLM:
    """A backbone whose memory layers read an external memory. Made by :func:`lightning_fot.attach_memory`.

    The backbone's parameters stay its own: ``lm.model`` is the model that was given, its ``state_dict`` unchanged.

    Args:
        attachment: The hooks on the backbone.
        config: How the memory is read.
    """

    def __init__(self, attachment: Attachment, config: MemoryConfig) -> None:
        self.attachment = attachment
        self.model = attachment.model
        self.config = config
        self._recorder: dict[int, list[Tensor]] | None = None
        self.gates = nn.ParameterDict()
        if config.integration == "gate":
            for index in attachment.memory_layers:
                # sigmoid(0): memory and local context weigh alike before training.
                self.gates[str(index)] = nn.Parameter(torch.zeros(attachment.facts[index].heads, device=self.device))
            attachment.gates = {int(index): gate for index, gate in self.gates.items()}

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Numbers of the memory layers, counted from 0."""
        return self.attachment.memory_layers

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.model.device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the memory layers away: the model computes what it computed before, bit for bit."""
        self.attachment.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The backbone's own."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def train(self, mode: bool = True) -> Self:
        """Sets the backbone's training mode."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """Sets the backbone's evaluation mode."""
        return self.train(False)

    def new_memory(self, batch_size: int = 1, retriever: Any = None) -> Memory:
        """An empty memory for this model.

        Args:
            batch_size: Rows, each with its own memory.
            retriever: In place of ``config.retriever``.
        """
        chosen = self.config.retriever if retriever is None else retriever
        return Memory(self._memory_shape(), batch_size, chosen, self.config.capacity, partial(fingerprint, self))

    def load_memory(self, folder: str | os.PathLike[str]) -> Memory:
        """Reads a memory that this model wrote with ``Memory.save``.

        Raises:
            SettingError: There is none, it is damaged, or it belongs to another model.
        """
        return load_memory(self, folder)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        update_memory: bool = False,
    ) -> MemoryLMOutput:
        """Reads input of any length beside a memory.

        Input longer than ``config.window`` is cut into windows; each first attends to the memory, then is added to it.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 0 or False for padding, on the left or on the right; None means no padding.
            memory: What was read before; None starts from an empty one.
            labels: (B, T) int64, -100 where there is no target, not shifted (as in transformers).
            logits_to_keep: Logits of the last tokens only; 0 gives all.
            update_memory: Add to ``memory`` itself. By default it stays as it is; ``out.memory`` is an extended copy.

        Returns:
            ``logits`` (B, T or logits_to_keep, vocabulary), ``loss`` where labels are given, and ``memory``.

        Raises:
            SettingError: Shapes, dtypes, the mask or the memory do not fit.
        """
        ids, lengths, places = self._rows(input_ids, attention_mask, memory)
        if labels is not None and labels.shape != input_ids.shape:
            raise SettingError("labels", tuple(labels.shape), f"is not {tuple(input_ids.shape)}", "Give one a token.")
        batch, length = ids.shape
        if memory is None:
            memory = self.new_memory(batch)
        elif not update_memory:
            memory = memory.snapshot()
        if places is not None and labels is not None:
            labels = torch.gather(labels, 1, places)
        keep_from = 0 if labels is not None or not logits_to_keep else max(0, length - logits_to_keep)
        if places is not None and keep_from:
            # Rows end at different places: the last logits of the shortest row may lie in an early window.
            keep_from = max(0, int(lengths.min()) - logits_to_keep)
        logits = torch.cat(list(self._read(ids, memory, lengths, places is not None, keep_from)), dim=1)
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].masked_fill(beyond(lengths, length, ids.device)[:, 1:], -100)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), shifted.flatten())
        if places is not None:
            full = logits.new_zeros(batch, length, logits.shape[-1])
            source = torch.nn.functional.pad(logits, (0, 0, length - logits.shape[1], 0))
            logits = full.scatter(1, places[..., None].expand_as(full), source)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        output = MemoryLMOutput(loss=loss, logits=logits)
        output.memory = memory
        return output

    @torch.no_grad()
    def ingest(
        self,
        input_ids: Tensor,
        memory: Memory,
        progress: Progress = False,
        attention_mask: Tensor | None = None,
    ) -> Memory:
        """Reads a text into a memory, without logits: nothing above the last memory layer is computed.

        Args:
            input_ids: (B, T) int64.
            memory: Extended in place, window by window; interrupted, it holds the windows read so far.
            progress: True draws a bar; a function is called with the tokens of each window.
            attention_mask: As in a call.

        Returns:
            ``memory``.

        Raises:
            SettingError: Shapes, dtypes, the mask or the memory do not fit.
        """
        ids, lengths, places = self._rows(input_ids, attention_mask, memory)
        with _reporter(progress, ids.numel()) as report:
            for _ in self._read(ids, memory, lengths, places is not None, ids.shape[1], report):
                pass
        return memory

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        update_memory: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """The ``generate`` of transformers beside a memory, for prompts and continuations of any length.

        When the local window is full it moves by a stride and keeps ``config.overlap`` tokens, half a window where that
        is 0: without an overlap the layers that have no memory would suddenly see a single token.

        Args:
            input_ids: (B, T) int64 prompts; padding on the left.
            memory: What was read before; None starts from an empty one.
            attention_mask: (B, T), 0 for padding.
            update_memory: Add prompt and continuation to ``memory``; by default it is not changed.
            **kwargs: As ``generate`` of transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``streamer``.

        Returns:
            (B, T + new) int64, as transformers gives them.

        Raises:
            SettingError: Shapes, dtypes, the mask or the memory do not fit.
        """
        self._rows(input_ids, attention_mask, memory)
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        kept = self.new_memory(len(ids)) if memory is None else memory
        cache = MemoryCache(
            kept if update_memory else kept.snapshot(),
            self.config,
            len(self.attachment.attentions),
            self.config.overlap or self.config.window // 2,
            self._recorder,
        )
        return generate(self.model, ids, mask, cache, update_memory, kwargs)

    def crossbatch(
        self,
        input_ids: Tensor,
        table: RowTable,
        previous_ids: Tensor | None = None,
        previous_valid: Tensor | None = None,
        differentiable: bool = True,
    ) -> Tensor:
        """Logits of a crossbatch (FoT paper section 3.2), with gradients.

        Args:
            input_ids: (B, T) int64, T at most a window.
            table: For each row the rows it sees: rows of this batch (``packed``), or rows of C_prev (``paper``).
            previous_ids: (B, w, T) previous windows of each row: the ``paper`` layout; None is ``packed``.
            previous_valid: (B, w) bool; False where a row has no such window yet.
            differentiable: Let gradients reach shown keys and values.

        Returns:
            (B, T, vocabulary).

        Raises:
            SettingError: The table does not fit the batch.
        """
        if len(table) != len(input_ids):
            raise SettingError("table", len(table), f"is not the batch's {len(input_ids)} rows", "Give one list a row.")
        if not self.memory_layers or previous_ids is None:
            current = CrossbatchPass(table, None, differentiable)
        else:
            rows, windows, _ = previous_ids.shape
            collected = CollectPass(self.memory_layers[-1])
            with self.attachment.during(collected):
                self.model(input_ids=previous_ids.flatten(0, 1), use_cache=False)
            valid = torch.ones(rows, windows) if previous_valid is None else previous_valid
            shown = [
                [row * windows + back for row in seen for back in range(windows) if bool(valid[row, back])]
                for seen in table
            ]
            current = CrossbatchPass(shown, collected.pairs, differentiable)
        with self.attachment.during(current):
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    @contextmanager
    def record_queries(self) -> Iterator[dict[int, list[Tensor]]]:
        """Notes the queries that memory layers search with inside the block.

        Yields:
            By layer, a list of (B·G, R·T, D) tensors, one a window, rotated as searched; bank = row · G + KV head.
        """
        outer, self._recorder = self._recorder, {}
        try:
            yield self._recorder
        finally:
            self._recorder = outer

    def _read(
        self,
        ids: Tensor,
        memory: Memory,
        lengths: Tensor,
        ragged: bool,
        keep_from: int,
        report: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[Tensor]:
        """Reads (B, T) ids window by window; yields the logits of tokens from ``keep_from`` on."""
        length = ids.shape[1]
        if self.config.overlap or self.config.sink_tokens:
            cache = MemoryCache(memory, self.config, len(self.attachment.attentions), recorder=self._recorder)
            valid = torch.arange(length, device=ids.device) < lengths.to(ids.device)[:, None]
            while cache.seen < length:
                start, stop = cache.seen, min(length, cache.seen + cache.room)
                logits = forward_cached(
                    self.model, ids[:, start:stop], valid[:, :stop], cache, stop - max(start, keep_from)
                )
                if logits is not None:
                    yield logits
                report(ids[:, start:stop].numel())
            cache.finish()
            return
        for start in range(0, length, self.config.window):
            part = ids[:, start : start + self.config.window]
            counts = (lengths - start).clamp(0, part.shape[1]) if ragged else None
            wanted = min(part.shape[1], start + part.shape[1] - keep_from)
            logits = self._read_window(part, memory, counts, max(0, wanted))
            if logits is not None:
                yield logits
            report(part.numel())

    def _rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input checked, on the model's device, with each row's tokens first: see :func:`tokens_first`."""
        rows = tokens_first(input_ids, attention_mask, self.device)
        if memory is not None and memory.batch_size != len(input_ids):
            raise SettingError(
                "memory", f"{memory.batch_size} rows", f"does not fit input of {len(input_ids)} rows",
                "Make it with new_memory(batch_size=...).",
            )  # fmt: skip
        if memory is not None and memory.shape != self._memory_shape():
            raise SettingError(
                "memory", str(memory.shape), f"does not fit this model's {self._memory_shape()}",
                "Make it with this model's new_memory.",
            )  # fmt: skip
        return rows

    def _memory_shape(self) -> MemoryShape:
        facts = [self.attachment.facts[index] for index in self.memory_layers]
        dtype = self.model.dtype if self.config.dtype is None else getattr(torch, self.config.dtype)
        return MemoryShape(
            self.memory_layers,
            tuple(fact.kv_heads for fact in facts),
            tuple(fact.head_dim for fact in facts),
            tuple(fact.value_dim for fact in facts),
            dtype,
            self.device,
        )

    def _read_window(self, ids: Tensor, memory: Memory, counts: Tensor | None, logits_to_keep: int) -> Tensor | None:
        """One window beside the memory, then into it. Logits (B, logits_to_keep, V); None for 0."""
        if not self.memory_layers and logits_to_keep == 0:
            return None
        stop = self.memory_layers[-1] if logits_to_keep == 0 else None
        current = WindowPass(memory, self.config.top_k, stop, self._recorder)
        logits: Tensor | None = None
        with self.attachment.during(current):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=logits_to_keep).logits
        skip = min(self.config.skip_window_start, ids.shape[1])
        pairs = {layer: (keys[:, :, skip:], values[:, :, skip:]) for layer, (keys, values) in current.pairs.items()}
        stored = None if counts is None else (counts - skip).clamp_min(0)
        if skip < ids.shape[1]:
            memory.append(pairs, stored)
        memory.tokens_seen += ids.shape[1] if counts is None else counts.cpu()
        return logits


@contextmanager
def _reporter(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda tokens: None
    else:
        from rich.progress import Progress as Bar

        with Bar() as bar:
            task = bar.add_task("reading", total=total)
            yield lambda tokens: bar.advance(task, tokens)
