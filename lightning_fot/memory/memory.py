"""The memory: stored (key, value) pairs of every memory layer, and which text they came from.

A memory is a value: :meth:`Memory.snapshot` costs nothing and neither copy sees what is added to the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.memory.base import BaseLayer
from lightning_fot.memory.on_disk import Saved, save_memory
from lightning_fot.memory.place import InProcess, MemoryShape, Place
from lightning_fot.memory.token_log import Document, TokenLog, TokensRead
from lightning_fot.system.lasting import lasting

# Dropped pairs are packed away once they are this share of the capacity: packing builds indexes anew.
PACKED_SHARE = 8

Pairs = Mapping[int, tuple[Tensor, Tensor]]


class Memory:
    """The external memory of an attached model: pairs of every memory layer, row by row.

    Whatever changes it changes all of it or, where an error ends it, nothing. Threads may share it: each change is seen
    whole or not at all, and :attr:`turn` is held by calls that read a text into it, so that whoever wants to change it
    otherwise waits until they have.

    Args:
        shape: Layers, heads, sizes and dtype of the model it belongs to.
        batch_size: B, independent rows.
        retriever: Specification as ``MemoryConfig.retriever``, for all layers or by layer; one is made for each layer.
        capacity: Tokens kept a row, oldest out; None keeps all.
        fingerprint: Says what made the pairs, JSON-able; called when the memory is saved.
        key_folder: Keep keys in files of this folder, paged in and out by the operating system; None keeps them in
            memory.
        value_folder: The same for values.
        layers: Pairs of each memory layer; None starts without.
        log: What they were read from; None is of nothing.
        place: Where pairs lie; None is this process, with its folders.

    Raises:
        SettingError: ``batch_size`` is below 1, or the retriever cannot be made.
    """

    @lasting
    def __init__(
        self,
        shape: MemoryShape,
        batch_size: int,
        retriever: RetrieverSpec,
        capacity: int | None = None,
        fingerprint: Callable[[], dict[str, Any]] | None = None,
        key_folder: str | None = None,
        value_folder: str | None = None,
        layers: dict[int, BaseLayer] | None = None,
        log: TokenLog | None = None,
        place: Place | None = None,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise SettingError("batch_size", batch_size, "a memory has at least one row", "Give the number of rows.")
        self._lock = RLock()
        self.turn = RLock()
        """Held while a text is read into the memory, and by all that changes it: one after the other."""
        self._reading: list[Sequence[str | None]] = []
        self.shape = shape
        self.batch_size = batch_size
        self.retriever = retriever
        self.capacity = capacity
        self.fingerprint = fingerprint
        self.log = TokenLog(batch_size) if log is None else log
        self.append_seconds = 0.0
        """Time in :meth:`append` since this memory was made or copied."""
        self.content = object()
        """Stands for what is stored: memories of the same one hold the same, and were not changed since."""
        self.forgotten = torch.zeros(batch_size, dtype=torch.int64)
        """(B,) int64: oldest pairs dropped so far in each row; a pair's number plus this never changes."""
        self.place = InProcess(key_folder, value_folder) if place is None else place
        self.layers: dict[int, BaseLayer] = (
            self.place.layers(shape, batch_size, retriever) if layers is None else layers
        )
        # What is on disk already, so that saving again writes what is new: see persistence.
        self.saved: dict[str, Saved] = {}

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens stored in each row."""
        layer = next(iter(self.layers.values()), None)
        return torch.tensor([0] * self.batch_size if layer is None else layer.lengths, dtype=torch.int64)

    def __len__(self) -> int:
        """Tokens stored in the longest row."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, indexes and the log of tokens, in memory or on disk."""
        return sum(layer.nbytes for layer in self.layers.values()) + self.log.nbytes

    @property
    def tokens_seen(self) -> Tensor:
        """(B,) int64: tokens read in each row, stored or not; padding does not count."""
        return self.log.seen

    @property
    def documents(self) -> list[Document]:
        """What was read, in the order in which each row began it."""
        with self._lock:
            return self.log.documents

    @contextmanager
    def _whole(self, log: bool = False) -> Iterator[None]:
        """A change of all layers and of the log, or of nothing; other threads see it when it is done.

        Args:
            log: The log is changed otherwise than by what is added to it.
        """
        # Who reads a text may give a copy back in the end: what another thread changed meanwhile would come back.
        with self.turn, self._lock, ExitStack() as back:
            self.content = object()
            forgotten, saved = self.forgotten, self.saved
            before = self.log.fork() if log else None
            undo = self.log.mark()
            for layer in self.layers.values():
                back.callback(layer.mark())
            try:
                yield
                for layer in self.layers.values():
                    layer.settle()
            except BaseException:
                self.forgotten, self.saved = forgotten, saved
                if before is None:
                    undo()
                else:
                    self.log = before
                raise
            back.pop_all()

    @contextmanager
    def reading(self, names: Sequence[str | None] | None) -> Iterator[None]:
        """Inside the block a text is read, and it is this thread's turn.

        Args:
            names: Its documents, one a row; None means of no name, which goes on with what had none.
        """
        with self.turn:
            with self._lock:
                if names is None:
                    self.log.end_named()
                else:
                    self.log.begin(names)
                    self._reading.append(names)
            try:
                yield
            finally:
                if names is not None:
                    with self._lock:
                        self._reading.remove(names)
                        self.log.end()

    @lasting
    def append(self, pairs: Pairs, lengths: Tensor | None = None, read: TokensRead | None = None) -> None:
        """Stores the pairs of all memory layers, or of none where something is wrong.

        Args:
            pairs: For each memory layer keys and values (B, G, n, D), keys as if at position 0.
            lengths: (B,) pairs that count in each row; None means n.
            read: The tokens of this step, of which the pairs are a part; None: unknown ones.

        Raises:
            SettingError: A memory layer's pairs are missing, misshapen or not finite, the disk is full, or the model's
                weights are not those that made the memory.
        """
        began = perf_counter()
        counts = self._checked(pairs, lengths)
        self._refuse_other_maker()
        full = self.capacity is not None and bool((self.lengths + counts > self.capacity).any())
        with self._whole(log=full):
            coded = self._coded
            for number, layer in self.layers.items():
                keys, values = pairs[number]
                # Stored pairs outlive the pass, and so no graph.
                layer.append(keys.detach(), values.detach(), lengths)
            for layer in self.layers.values():
                layer.settle()
            if any(old is not None and old is not new for old, new in zip(coded, self._coded, strict=True)):
                # What is on disk was coded otherwise.
                self.saved = {}
            if read is not None:
                self.log.extend(read)
            else:
                self.log.skip(counts)
            self._drop_oldest()
        self.append_seconds += perf_counter() - began

    @property
    def _coded(self) -> list[object | None]:
        """What eight-bit vectors were coded with."""
        return [coding for layer in self.layers.values() for coding in layer.codings]

    def _checked(self, pairs: Pairs, lengths: Tensor | None) -> Tensor:
        """Pairs that each row gets, (B,), once everything about them is known to be right."""
        missing = [layer for layer in self.layers if layer not in pairs]
        if missing:
            raise SettingError("pairs", sorted(pairs), f"lacks memory layers {missing}", "Give all memory layers.")
        new = {pairs[number][0].shape[2:3] for number in self.layers} or {torch.Size([0])}
        for number, layer in self.layers.items():
            for name, tensor, dim in (
                ("keys", pairs[number][0], layer.key_dim),
                ("values", pairs[number][1], layer.value_dim),
            ):
                wanted = (self.batch_size, layer.kv_heads, *min(new), dim)
                if tuple(tensor.shape) != wanted or not tensor.is_floating_point():
                    raise SettingError(
                        f"pairs[{number}]", f"{name} {tuple(tensor.shape)} {tensor.dtype}",
                        f"is not {wanted} (rows, KV heads, tokens, size) in a floating dtype", "Give one pair a token.",
                    )  # fmt: skip
                if not bool(torch.isfinite(tensor).all()):
                    self._refuse_unless_padding(number, name, tensor, lengths)
        width = int(min(new)[0])
        if lengths is None:
            return torch.full((self.batch_size,), width)
        counts = lengths.cpu().to(torch.int64)
        if counts.shape != (self.batch_size,) or not 0 <= int(counts.min()) <= int(counts.max()) <= width:
            raise SettingError(
                "lengths", lengths.tolist(), f"is not {self.batch_size} numbers from 0 to {width}", "Give one a row."
            )
        return counts

    def _refuse_unless_padding(self, number: int, name: str, tensor: Tensor, lengths: Tensor | None) -> None:
        counts = torch.full((self.batch_size,), tensor.shape[2]) if lengths is None else lengths.cpu()
        for row, count in enumerate(counts.tolist()):
            if not bool(torch.isfinite(tensor[row, :, :count]).all()):
                raise SettingError(
                    f"pairs[{number}]", f"{name} with nan or inf", f"are not finite in row {row}",
                    "Check the model's activations and its dtype.",
                )  # fmt: skip

    def _refuse_other_maker(self) -> None:
        """Tokens of one text are read by what the memory says has read it."""
        refuse_changed = getattr(self.fingerprint, "refuse_changed", None)
        if refuse_changed is not None:
            refuse_changed()

    def _drop_oldest(self) -> None:
        if self.capacity is None or not self.layers:
            return
        excess = (self.lengths - self.capacity).clamp_min(0)
        if not bool(excess.any()):
            return
        kept = [torch.arange(length) >= count for length, count in zip(self.lengths.tolist(), excess, strict=True)]
        for layer in self.layers.values():
            layer.drop_oldest(excess.tolist())
            if layer.unpacked > self.capacity // PACKED_SHARE:
                layer.pack()
        self.log.keep(kept)
        self.forgotten = self.forgotten + excess
        self.saved = {}

    @lasting
    def forget(self, document: str) -> int:
        """Forgets a document in every row; indexes are built anew.

        Args:
            document: The name it was read under.

        Returns:
            Pairs that went, of each layer and KV head.

        Raises:
            SettingError: No row holds a document of that name, or it is just being read.
        """
        with self._whole(log=True):
            found = self.log.find(document)
            if not found:
                names = sorted({known.name for known in self.documents if known.name is not None})
                raise SettingError(
                    "document", document, "is not in this memory", f"It holds: {', '.join(names) or 'none'}."
                )
            if any(document in names for names in self._reading):
                raise SettingError(
                    "document", document, "is being read into this memory", "Forget it when it has been read."
                )
            masks = [torch.ones(length, dtype=torch.bool) for length in self.lengths.tolist()]
            for known in found:
                masks[known.row][self.log.rows_of(known.number)] = False
            for layer in self.layers.values():
                layer.keep(masks)
            self.log.keep(masks)
            # Too short to have stored anything, it is known to the log alone.
            self.log.drop(document)
            self.saved = {}
        return sum(known.stored for known in found)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives documents other names in every row, all at once, so that two may change theirs with each other.

        Args:
            names: New names by old ones; what the memory does not hold is passed over.

        Raises:
            SettingError: Two documents of a row would have one name, or one is just being read.
        """
        with self._whole(log=True):
            read = next((name for names_read in self._reading for name in names_read if name in names), None)
            if read is not None:
                raise SettingError("names", read, "is being read into this memory", "Rename it when it has been read.")
            try:
                self.log.rename(names)
            except ValueError as error:
                raise SettingError("names", dict(names), f"cannot be: {error}", "Give free names.") from error

    @lasting
    def snapshot(self) -> Memory:
        """An independent memory that shares what is stored so far: O(1), copied on write."""
        with self._lock:
            layers = {number: layer.snapshot() for number, layer in self.layers.items()}
            other = self._with(layers, self.log.fork(), self.batch_size)
            other.forgotten, other.saved, other.content = self.forgotten, dict(self.saved), self.content
        other.log.end_named()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return self.snapshot()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {**self.__dict__, "saved": {}, "_reading": []}
        del state["_lock"], state["turn"], state["content"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self.turn, self.content = RLock(), RLock(), object()

    @lasting
    def select_rows(self, rows: Tensor) -> Memory:
        """A memory whose row i is a snapshot of row ``rows[i]`` (beam search): nothing is copied.

        Args:
            rows: (n,) int64, repeated ones too.
        """
        index = rows.tolist()
        with self._lock:
            layers = {number: layer.select_rows(index) for number, layer in self.layers.items()}
            other = self._with(layers, self.log.select_rows(rows), len(index))
            other.forgotten = self.forgotten[index]
        other.log.end_named()
        return other

    def _with(self, layers: dict[int, BaseLayer], log: TokenLog, rows: int) -> Memory:
        return Memory(
            self.shape, rows, self.retriever, self.capacity, self.fingerprint, layers=layers, log=log, place=self.place
        )

    def take(self, other: Memory) -> None:
        """Becomes what another memory of the same model is, as if it had read the same; the other is given up."""
        with self._lock:
            self.layers, self.log, self.forgotten = other.layers, other.log, other.forgotten
            self.saved, self.append_seconds, self.content = other.saved, other.append_seconds, object()

    @lasting
    def reset(self) -> None:
        """Forgets everything stored."""
        with self._whole(log=True):
            self.log = TokenLog(self.batch_size)
            self.forgotten = torch.zeros(self.batch_size, dtype=torch.int64)
            self.saved = {}
            for layer in self.layers.values():
                layer.reset()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the memory as safetensors and JSON; what the folder held before is replaced whole or not at all.

        Saved again into the same folder, only what was added since is written.

        Raises:
            SettingError: The folder cannot be written, or the memory was not made by a model.
        """
        if self.fingerprint is None:
            raise SettingError("memory", repr(self), "belongs to no model", "Make it with the model's new_memory.")
        # Of what is there now, whatever other threads add while files are written.
        whole, known = self.snapshot(), self.saved
        save_memory(whole, self.fingerprint(), folder)
        with self._lock:
            # What has been forgotten meanwhile is in the files still.
            if self.saved is known:
                self.saved = whole.saved

    def flush(self) -> None:
        """Builds now whatever index work is pending, and waits for it."""
        for layer in self.layers.values():
            layer.retriever.flush()

    def __repr__(self) -> str:
        return (
            f"Memory(tokens={self.lengths.tolist()}, layers={list(self.layers)}, retriever={self.retriever!r}, "
            f"bytes={self.nbytes})"
        )
