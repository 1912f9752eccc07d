"""A language model with a memory attached: reading input of any length, and training on crossbatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.memory.memory import Memory
from lightning_fot.memory.on_disk import load_memory
from lightning_fot.memory.passages import AttentionTrace
from lightning_fot.memory.place import MemoryShape, Place
from lightning_fot.model.attention.crossbatch import RowTable
from lightning_fot.model.backbone.attachment import Attachment
from lightning_fot.model.backbone.fingerprint import Identity
from lightning_fot.model.passes.crossbatch import CollectPass, CrossbatchPass
from lightning_fot.model.passes.recorder import Recorder
from lightning_fot.model.reading.generation import check_options, generate, read_cached, while_generating
from lightning_fot.model.reading.inputs import (
    check_count,
    check_ids,
    check_memory,
    check_switch,
    check_table,
    checked_labels,
    tokens_first,
)
from lightning_fot.model.reading.logits import LogitsCollector, head_of
from lightning_fot.model.reading.together import Continuation
from lightning_fot.model.reading.windows import read_windows
from lightning_fot.model.saving import save_attached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.model.passes.gather import RowGather
    from lightning_fot.model.passes.local_window import MemoryCache

Progress = bool | Callable[[int], None]


class MemoryLMOutput(CausalLMOutputWithPast):
    """Output of transformers with the memory after reading in ``memory`` (not an entry of the tuple)."""

    memory: Memory


class MemoryLM:
    """A backbone whose memory layers read an external memory. Made by :func:`lightning_fot.attach_memory`.

    The backbone's parameters stay its own: ``lm.model`` is the model that was given, its ``state_dict`` unchanged.

    Args:
        attachment: The hooks on the backbone, and how the memory is read.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.model = attachment.model
        self._identity = Identity(attachment)
        with torch.inference_mode(False):
            self.gates: nn.ParameterDict = attachment.way.gates(attachment)
        """What the way of attending learns beside the backbone; empty for FoT's own."""
        attachment.hooks.gates = {int(index): gate for index, gate in self.gates.items()}

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Numbers of the memory layers, counted from 0."""
        return self.attachment.memory_layers

    @property
    def config(self) -> MemoryConfig:
        """How the memory is read."""
        return self.attachment.config

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.attachment.device

    @property
    def vocabulary(self) -> int:
        """Tokens that the backbone knows."""
        return self.attachment.vocabulary

    @property
    def recorder(self) -> Recorder | None:
        """What passes of this thread note while ``record_queries`` or ``record_attention`` is open."""
        return self.attachment.recorder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the memory layers away: the model computes what it computed before, bit for bit."""
        self.attachment.detach()
        self._identity.rest()

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

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes a folder that any user of transformers opens, and ``attach_pretrained`` with its memory settings.

        Args:
            folder: Replaced as a whole if it is such a folder; the old one stays until the new one is complete.
            tokenizer: Saved too; ``load_tokenizer`` and the command line need one in the folder.

        Raises:
            SettingError: The retriever is a Python object, or ``folder`` is a file, holds anything else, or cannot be
                written.
        """
        save_attached(self.attachment, folder, tokenizer)

    def new_memory(self, batch_size: int = 1, retriever: RetrieverSpec | None = None) -> Memory:
        """An empty memory for this model.

        Args:
            batch_size: Rows, each with its own memory.
            retriever: In place of ``config.retriever``.
        """
        chosen = self.config.retriever if retriever is None else retriever
        folder = self.config.offload_dir
        return Memory(
            self._memory_shape(),
            batch_size,
            chosen,
            self.config.capacity,
            self._identity.now(),
            key_folder=folder if self.config.offload == "all" else None,
            value_folder=folder,
            place=self._place(),
        )

    def _place(self) -> Place | None:
        """Where the pairs of memories lie; None is this process."""
        settings = self.config.sharding
        if settings is None:
            return None
        from lightning_fot.shards.place import Sharded

        return Sharded(settings)

    def load_memory(self, folder: str | os.PathLike[str], retriever: RetrieverSpec | None = None) -> Memory:
        """Reads a memory that this model wrote with ``Memory.save``.

        Args:
            folder: What it was saved in.
            retriever: In place of ``config.retriever``.

        Raises:
            SettingError: There is none, it is damaged, or it belongs to another model.
        """
        return load_memory(folder, self._identity.like, lambda rows: self.new_memory(rows, retriever))

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
            labels: (B, T) int64, -100 where there is no target, not shifted (as in transformers). Padding is no target.
            logits_to_keep: Logits of the last columns only; 0 gives all. The loss is that of all tokens either way, so
                that with 1 the loss of a text of any length takes the logits of one window at a time.
            update_memory: Add to ``memory`` itself. By default it stays as it is; ``out.memory`` is an extended copy.

        Returns:
            ``logits`` (B, T or logits_to_keep, vocabulary), ``loss`` where labels are given, and ``memory``.

        Raises:
            SettingError: Shapes, dtypes, the mask or the memory do not fit.
        """
        check_count("logits_to_keep", logits_to_keep)
        check_switch("update_memory", update_memory)
        ids, lengths, places = self._rows(input_ids, attention_mask, memory)
        if labels is not None:
            labels = checked_labels(labels, input_ids, self.vocabulary, self.device)
        batch = len(ids)
        if memory is not None and len(memory):
            self.attachment.way.settings.check_memory("reading beside one")
        if memory is None:
            memory = self.new_memory(batch)
        elif not update_memory:
            memory = memory.snapshot()
        else:
            self._identity.now().digest()
        with memory.reading(None):
            return self._read(ids, memory, lengths, places, labels, logits_to_keep)

    def _read(
        self,
        ids: Tensor,
        memory: Memory,
        lengths: Tensor,
        places: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int,
    ) -> MemoryLMOutput:
        length = ids.shape[1]
        collector = LogitsCollector(length, lengths, places, labels, logits_to_keep, ids.device)
        for logits in read_windows(self.attachment, ids, memory, lengths, places is not None, collector.read_from):
            collector.add(logits)
        output = MemoryLMOutput(loss=collector.loss(), logits=collector.logits())
        output.memory = memory
        return output

    @torch.no_grad()
    def ingest(
        self,
        input_ids: Tensor,
        memory: Memory,
        progress: Progress = False,
        attention_mask: Tensor | None = None,
        document: str | Sequence[str | None] | None = None,
    ) -> Memory:
        """Reads a text into a memory, without logits: nothing above the last memory layer is computed.

        Args:
            input_ids: (B, T) int64.
            memory: Extended in place, window by window; interrupted, it holds the windows read so far.
            progress: True draws a bar; a function is called with the tokens of each window.
            attention_mask: As in a call.
            document: Name of the text, one for all rows or one a row, by which :attr:`Memory.documents` and passages
                know it. A name given before continues that document. Without a name, a text that has none goes on.

        Returns:
            ``memory``.

        Raises:
            SettingError: Shapes, dtypes, the mask, the names or the memory do not fit.
        """
        self.attachment.way.settings.check_memory("ingest")
        ids, lengths, places = self._rows(input_ids, attention_mask, memory)
        self._identity.now().digest()
        names: list[str | None] | None = None
        if document is not None:
            names = [document] * len(ids) if isinstance(document, str) else list(document)
            if len(names) != len(ids):
                raise SettingError("document", names, f"is not {len(ids)} names", "Give one a row, or one for all.")
        with memory.reading(names), _reporter(progress, ids.numel()) as report:
            ragged = places is not None
            for _ in read_windows(self.attachment, ids, memory, lengths, ragged, ids.shape[1], report, names):
                pass
        return memory

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        memory: Memory | None = None,
        attention_mask: Tensor | None = None,
        update_memory: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The ``generate`` of transformers beside a memory, for prompts and continuations of any length.

        When the local window of a row is full it moves by a stride and keeps ``config.overlap`` tokens, and
        ``config.sink_tokens`` of the start. Where ``overlap`` is 0 it keeps half a window and a few sinks all the same
        (see ``while_generating``). Rows of a batch get what they would get alone, in
        tokens and in memory; what follows the end of a row is not stored.

        With ``config.last_context_length``, a prompt longer than the window is cut as in LongLLaMA: its last
        ``last_context_length`` tokens are the local context, all before is ingested. Shorter prompts are not cut.

        Args:
            input_ids: (B, T) int64 prompts, each ending in the last column.
            memory: What was read before; None starts from an empty one.
            attention_mask: (B, T), 0 for padding, on the left or in between.
            update_memory: Add prompt and continuation to ``memory``, once they are complete; by default, and after an
                error, it is as before.
            **kwargs: As ``generate`` of transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``streamer``,
                ``stopping_criteria``, ``generation_config``, ``return_dict_in_generate`` and so on.

        Returns:
            (B, T + new) int64 or an output object, as transformers gives them. A row that ends before others has
            padding behind, whatever has ended it: ``pad_token_id``, else the end token, else 0.

        Raises:
            SettingError: Shapes, dtypes, the mask or the memory do not fit, or an option cannot work beside a memory:
                the message names it.
        """
        self.attachment.way.settings.check_goes_on("generating")
        check_options(self.model, kwargs, update_memory)
        if input_ids is None:
            raise SettingError("input_ids", None, "leaves nothing to continue", "Give a prompt, (B, T) int64.")
        ids, lengths, _ = self._rows(input_ids, attention_mask, memory)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise SettingError(
                "attention_mask", "padding on the right", "leaves nothing to continue", "Pad on the left."
            )
        kept = self.new_memory(len(ids)) if memory is None else memory
        if update_memory:
            self._identity.now().digest()
        config = while_generating(self.config)
        with kept.turn if update_memory else nullcontext():
            cache = self.attachment.new_cache(kept.snapshot(), config, self.recorder)
            read_prompt = partial(self._read_prompt, ids, lengths, cache)
            generated = generate(self.model, input_ids.to(self.device), read_prompt, cache, update_memory, kwargs)
            if update_memory:
                kept.take(cache.memory)
                cache.memory = kept
        return generated

    def beside(self, memory: Memory) -> dict[str, Any]:
        """Arguments with which transformers' own ``generate``, or a pipeline, continues one text beside a memory.

        For programs that call the backbone themselves. Up to a prompt of one window the continuation is that of
        :meth:`generate`; longer ones are read in equal parts, so that windows begin at other places. :meth:`generate`
        does more: it refuses options that cannot work here, repeats the memory for beams, may add to it, and cuts
        prompts as ``config.last_context_length`` says.

        Args:
            memory: What was read, a row for each of the batch and each of its beams; it stays as it is.

        Returns:
            ``past_key_values``, good for one call, and ``prefill_chunk_size``, so that a prompt may be longer than the
            window.

        Raises:
            SettingError: The memory is another model's, or the way of attending cannot go on token by token.

        Example:
            >>> import torch
            >>> from lightning_fot import attach_pretrained
            >>> with attach_pretrained("tiny-random-llama", memory_layers=[1], window=16) as lm:
            ...     memory = lm.ingest(torch.arange(40)[None], lm.new_memory())
            ...     out = lm.model.generate(torch.arange(30)[None], max_new_tokens=4, **lm.beside(memory))
            >>> out.shape
            torch.Size([1, 34])
        """
        self.attachment.way.settings.check_goes_on("generating")
        self.attachment.check_attached()
        check_memory(memory, memory.batch_size, self._memory_shape(), self._identity.now())
        config = while_generating(self.config)
        cache = self.attachment.new_cache(memory.snapshot(), config, self.recorder)
        chunk = config.window - config.sink_tokens - config.overlap
        return {"past_key_values": cache, "prefill_chunk_size": chunk}

    def continuation(self, prompt: Sequence[int], memory: Memory, trace: AttentionTrace | None = None) -> Continuation:
        """A text that goes on side by side with others: see :mod:`lightning_fot.model.reading.together`.

        Args:
            prompt: Its tokens.
            memory: One row; it stays as it is.
            trace: Notes what memory layers attend to.

        Raises:
            SettingError: The prompt or the memory do not fit, or the way of attending cannot go on token by token.
        """
        self.attachment.way.settings.check_goes_on("generating")
        ids, _, _ = self._rows(torch.tensor([list(prompt)], dtype=torch.int64), None, memory)
        recorder = None if trace is None else Recorder(attention=trace)
        return Continuation(self.attachment, ids[0], memory.snapshot(), recorder)

    def _read_prompt(self, ids: Tensor, lengths: Tensor, cache: MemoryCache) -> None:
        """Reads rows (B, T) of ``lengths`` (B,) tokens, all but the last of each."""
        last = self.config.last_context_length
        if last is not None and int(lengths.max()) > self.config.window:
            before = torch.where(lengths > self.config.window, lengths - last, 0)
            longest = int(before.max())
            for _ in read_windows(self.attachment, ids[:, :longest], cache.memory, before, True, longest):
                pass
            places = torch.arange(ids.shape[1] - int(before.min())) + before[:, None]
            ids = ids.gather(1, places.clamp_max(ids.shape[1] - 1).to(ids.device))
            lengths = lengths - before
        read_cached(self.model, ids, lengths - 1, cache)

    def crossbatch(
        self,
        input_ids: Tensor,
        table: RowTable,
        previous_ids: Tensor | None = None,
        previous_valid: Tensor | None = None,
        differentiable: bool = True,
        gather: RowGather | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits of a crossbatch (FoT paper section 3.2), with gradients.

        Args:
            input_ids: (B, T) int64, T at most a window.
            table: For each row the rows it sees: rows of this batch (``packed``), or rows of C_prev (``paper``).
            previous_ids: (B, w, T) previous windows of each row: the ``paper`` layout; None is ``packed``.
            previous_valid: (B, w) bool; False where a row has no such window yet.
            differentiable: Let gradients reach shown keys and values.
            gather: Shows the rows of all ranks: the table then numbers those. Every rank must make the same call.
            wanted: (B, T) bool; logits of these N tokens alone: a vocabulary is most of what a small model computes.

        Returns:
            (B, T, vocabulary), or (1, N, vocabulary) of what is wanted, row by row.

        Raises:
            SettingError: The table does not fit the batch, or there are no such tokens.
        """
        check_ids("input_ids", input_ids, self.vocabulary)
        own = len(input_ids) if previous_ids is None else len(previous_ids)
        check_table(table, len(input_ids), own * (1 if gather is None else gather.world_size))
        if not self.memory_layers or previous_ids is None:
            current = CrossbatchPass(table, None, differentiable, gather)
        else:
            check_ids("previous_ids", previous_ids, self.vocabulary, dims=3)
            rows, windows, _ = previous_ids.shape
            collected = CollectPass(self.memory_layers[-1])
            with self.attachment.during(collected):
                self.model(input_ids=previous_ids.flatten(0, 1), use_cache=False)
            valid = torch.ones(rows, windows) if previous_valid is None else previous_valid
            valid = valid if gather is None else gather(valid.to(input_ids.device, torch.uint8))
            shown = [
                [row * windows + back for row in seen for back in range(windows) if bool(valid[row, back])]
                for seen in table
            ]
            # Not the pass's own mapping: a layer run again in the backward pass would fill it anew.
            current = CrossbatchPass(shown, dict(collected.pairs), differentiable, gather)
            collected.pairs.clear()
        with (
            self.attachment.during(self.attachment.window_pass(input_ids.shape[1]) or current),
            head_of(self.model, wanted),
        ):
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        if wanted is not None and logits.shape[:2] == wanted.shape:
            # A model without an output layer of its own gave all of them.
            return logits[wanted][None]
        return logits

    @contextmanager
    def record_queries(self) -> Iterator[dict[int, list[Tensor]]]:
        """Notes the queries that memory layers search with inside the block.

        Yields:
            By layer, a list of (B·G, R·T, D) tensors, one a window, rotated as searched; bank = row · G + KV head.
        """
        queries: dict[int, list[Tensor]] = {}
        with self.attachment.calls.during(recorder=replace(self.recorder or Recorder(), queries=queries)):
            yield queries

    @contextmanager
    def record_attention(self) -> Iterator[AttentionTrace]:
        """Notes what memory layers attend to inside the block, for passages: see :class:`AttentionTrace`.

        Example:
            ``with lm.record_attention() as trace: lm.generate(ids, memory)``, then ``trace.passages(memory)``.
        """
        trace = AttentionTrace()
        with self.attachment.calls.during(recorder=replace(self.recorder or Recorder(), attention=trace)):
            yield trace

    def _rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input checked, on the model's device, with each row's tokens first: see :func:`tokens_first`."""
        self.attachment.check_attached()
        rows = tokens_first(input_ids, attention_mask, self.device, self.vocabulary)
        if memory is not None:
            check_memory(memory, len(input_ids), self._memory_shape(), self._identity.now())
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
