"""Memories on disk: safetensors and JSON, written so that a kill at any moment leaves the old memory or the new one.

The folder holds ``memory.json``, which names data files and their SHA-256. Files are written first, under names of
their own; then ``memory.json`` is replaced, which file systems do whole. Pairs never change, so a memory that grew is
saved by one more file with what is new. Files of the save before stay for those who have read its ``memory.json`` and
are still opening what it names; older ones are removed, and nothing that no ``memory.json`` here has named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from lightning_fot.errors import SettingError
from lightning_fot.memory.card import CARD, write_card
from lightning_fot.memory.token_log import TokenLog
from lightning_fot.retrievers.keys.quantiser import Quantiser
from lightning_fot.system.digests import file_digest, sealed, unsealed
from lightning_fot.system.files import clean, json_text, publish, workspace, write_text
from lightning_fot.system.tensor_files import Entry, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot.memory.layer import MemoryLayer
    from lightning_fot.retrievers.keys.store import KeyStore

FORMATS = (2, 3)
INDEX_FILE = "memory.json"
# A folder of more data files than this is written anew as one.
MOST_FILES = 64
# How often a reader begins again because a writer has saved meanwhile.
_READS = 20
# What a data file is called: an index may name no other file, and so none of other folders.
_DATA_FILE = re.compile(r"(?:memory|log)-[0-9a-f]{16}\.safetensors")
# Temporary files of versions before 0.2, which kills left.
_OLD_LEFTOVERS = "tmp????????.part"

# Digest of the index that a folder was given, and how far each row is in it.
Saved = tuple[str, list[int]]


class Stored(Protocol):
    """What is saved and loaded: a :class:`~lightning_fot.memory.memory.Memory`."""

    layers: dict[int, MemoryLayer]
    log: TokenLog
    saved: dict[str, Saved]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens stored in each row."""
        ...


StoredT = TypeVar("StoredT", bound=Stored)


def save_memory(memory: Stored, fingerprint: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes a memory; one already in the folder is replaced at once or not at all.

    Args:
        memory: What to save; its ``saved`` then says what the folder holds.
        fingerprint: Of the model that made it, JSON-able.
        folder: Made where it is missing.

    Raises:
        SettingError: The folder cannot be written.
    """
    target = Path(folder)
    lengths = memory.lengths.tolist()
    try:
        target.mkdir(parents=True, exist_ok=True)
        clean(target)
        for left in target.glob(_OLD_LEFTOVERS):
            left.unlink(missing_ok=True)
        before, older = _named_before(target)
        shards, done = _already_there(memory, target)
        if not shards or lengths != done:
            file = _write(target, "memory", _pairs(memory, done, lengths))
            shards = [*shards, {**file, "start": done, "stop": lengths}]
        log, documents = memory.log.state()
        log_file = _write(target, "log", _log_entries(memory, log))
        coded = any(layer.key_store.dtype == torch.int8 for layer in memory.layers.values())
        index = {
            # In eight bits, a scale below zero says that a vector is coded alone: earlier versions must not read it.
            "format": FORMATS[1] if coded else FORMATS[0],
            "fingerprint": fingerprint,
            "rows": len(lengths),
            "lengths": lengths,
            "pairs": shards,
            "log": log_file,
            "documents": documents,
            "before": before,
        }
        text = json_text(sealed(index))
        write_text(target / INDEX_FILE, text)
        write_card(target, fingerprint, lengths, [(one["name"], one["first"] + one["kept"]) for one in documents])
    except OSError as error:
        raise SettingError("folder", str(folder), f"cannot be written ({error})", "Choose another folder.") from error
    memory.saved = {str(target.resolve()): (_text_digest(text), lengths)}
    named = {file["file"] for file in (*shards, log_file)}
    for name in set(older) - named - set(before):
        (target / name).unlink(missing_ok=True)


def saved_files(folder: Path) -> list[str]:
    """Names of the files of a saved memory, its card included, and of nothing else that lies there.

    Raises:
        SettingError: It is damaged.
    """
    try:
        index = unsealed(folder / INDEX_FILE, (folder / INDEX_FILE).read_text(encoding="utf-8"))
        named = [str(file["file"]) for file in (*index["pairs"], index["log"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError("folder", str(folder), f"is no saved memory ({error})", "Save it again.") from error
    return [INDEX_FILE, *filter(_DATA_FILE.fullmatch, named), *([CARD] if (folder / CARD).is_file() else [])]


def _named_before(target: Path) -> tuple[list[str], list[str]]:
    """Data files that the index in the folder names, and those that the one before it did."""
    try:
        index = unsealed(target / INDEX_FILE, (target / INDEX_FILE).read_text(encoding="utf-8"))
        now = [str(file["file"]) for file in (*index["pairs"], index["log"])]
        older = [str(name) for name in index.get("before", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
    # Files that are not named as ours are nobody's to remove.
    return list(filter(_DATA_FILE.fullmatch, now)), list(filter(_DATA_FILE.fullmatch, older))


def _already_there(memory: Stored, target: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Data files in the folder that hold the start of this memory, and how far each row is in them."""
    nothing: tuple[list[dict[str, Any]], list[int]] = ([], [0] * len(memory.lengths))
    known = memory.saved.get(str(target.resolve()))
    index_file = target / INDEX_FILE
    if known is None or not index_file.is_file():
        return nothing
    text = index_file.read_text(encoding="utf-8")
    digest, lengths = known
    if _text_digest(text) != digest:
        return nothing
    shards = json.loads(text)["pairs"]
    if len(shards) >= MOST_FILES or not all((target / shard["file"]).is_file() for shard in shards):
        return nothing
    return shards, list(lengths)


def _pairs(memory: Stored, start: list[int], stop: list[int]) -> list[Entry]:
    entries = []
    for number, layer in memory.layers.items():
        for name, store in (("keys", layer.key_store), ("values", layer.value_store)):
            entries += _store_entries(f"{number}.{name}", layer, store, start, stop)
    return entries


def _store_entries(name: str, layer: MemoryLayer, store: KeyStore, start: list[int], stop: list[int]) -> list[Entry]:
    """Pairs ``start[b]`` to ``stop[b]`` of each row b as (banks, n, dim), shorter banks filled with zeros."""
    width = max(end - begin for begin, end in zip(start, stop, strict=True))

    def pieces(scales: bool) -> Iterator[Tensor]:
        for bank in range(store.banks):
            row = bank // layer.kv_heads
            first, last = (number + layer.dropped[row] for number in (start[row], stop[row]))
            for data, scale in store.raw(bank, first, last):
                yield scale if scales and scale is not None else data
            missing = width - (last - first)
            if missing:
                yield (
                    torch.zeros(missing, dtype=torch.float16)
                    if scales
                    else torch.zeros(missing, store.dim, dtype=store.dtype)
                )

    entries = [Entry(name, store.dtype, (store.banks, width, store.dim), pieces(False))]
    if store.dtype == torch.int8:
        entries.append(Entry(f"{name}.scales", torch.float16, (store.banks, width), pieces(True)))
    return entries


def _log_entries(memory: Stored, log: dict[str, Tensor]) -> list[Entry]:
    tensors = dict(log)
    for number, layer in memory.layers.items():
        for name, store in (("keys", layer.key_store), ("values", layer.value_store)):
            if store.quantiser is not None:
                tensors[f"{number}.{name}.centre"] = store.quantiser.centre
                tensors[f"{number}.{name}.spread"] = store.quantiser.spread
    return [Entry(name, tensor.dtype, tuple(tensor.shape), iter([tensor])) for name, tensor in tensors.items()]


def load_memory(
    folder: str | os.PathLike[str], expected: Callable[[Any], dict[str, Any]], empty: Callable[[int], StoredT]
) -> StoredT:
    """Reads a memory that the same model wrote. Indexes are built again when they are first needed.

    Pairs in one file are mapped, not read: the operating system brings in what is used.

    Args:
        folder: As given to :func:`save_memory`.
        expected: Gives the fingerprint of the model that will read it, to be compared with the one that was written.
        empty: Makes an empty memory of so many rows.

    Raises:
        SettingError: There is none, it is damaged, or it belongs to another model.
    """
    source = Path(folder)
    index, text = _read_index(source, folder)
    for _ in range(_READS):
        try:
            return _load(source, index, text, folder, expected, empty)
        except SettingError:
            # A writer beside this process may have saved twice since, and removed what the index named.
            now, later = _read_index(source, folder)
            if later == text:
                raise
            index, text = now, later
    return _load(source, index, text, folder, expected, empty)


def _load(
    source: Path,
    index: dict[str, Any],
    text: str,
    folder: str | os.PathLike[str],
    expected: Callable[[Any], dict[str, Any]],
    empty: Callable[[int], StoredT],
) -> StoredT:
    _refuse_other_model(expected(index["fingerprint"]), index["fingerprint"], folder)
    memory = empty(index["rows"])
    try:
        log = _read_checked(source, index["log"], folder)
        memory.log = TokenLog.restore(log, index["documents"])
        # It may have been written while one was being read.
        memory.log.end_named()
        for shard in index["pairs"]:
            tensors = _read_checked(source, shard, folder)
            for number, layer in memory.layers.items():
                counts = [b - a for a, b in zip(shard["start"], shard["stop"], strict=True)]
                per_bank = [count for count in counts for _ in range(layer.kv_heads)]
                for name, store in (("keys", layer.key_store), ("values", layer.value_store)):
                    key = f"{number}.{name}"
                    if f"{key}.centre" in log:
                        centre, spread = log[f"{key}.centre"], log[f"{key}.spread"]
                        store.quantiser = Quantiser(centre.to(store.device), spread.to(store.device))
                    data, scales = tensors[key].to(store.device), tensors.get(f"{key}.scales")
                    scales = None if scales is None else scales.to(store.device)
                    if len(index["pairs"]) == 1:
                        store.adopt(data, scales, per_bank)
                    else:
                        store.append_raw(data, scales, per_bank)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(folder, f"its files do not fit together: {error}") from error
    if memory.lengths.tolist() != (index["lengths"] if memory.layers else [0] * index["rows"]):
        raise _damaged(folder, "its files hold more or fewer tokens than memory.json says")
    for layer in memory.layers.values():
        layer.retriever.renumber()
    memory.saved = {str(source.resolve()): (_text_digest(text), index["lengths"])}
    return memory


def _read_index(source: Path, folder: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    index_file = source / INDEX_FILE
    if not index_file.is_file():
        raise SettingError("folder", str(folder), f"holds no {INDEX_FILE}", "Give a folder that Memory.save wrote.")
    try:
        text = index_file.read_text(encoding="utf-8")
        index = unsealed(index_file, text)
        written = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{INDEX_FILE} cannot be read: {error}") from error
    if written not in FORMATS:
        readable = " and ".join(map(str, FORMATS))
        raise SettingError(
            "folder", str(folder), f"has format {written}, this version reads {readable}", "Ingest the documents again."
        )
    missing = {"fingerprint", "rows", "lengths", "pairs", "log", "documents"} - index.keys()
    if missing:
        raise _damaged(folder, f"{INDEX_FILE} lacks {', '.join(sorted(missing))}")
    rows, lengths = index["rows"], index["lengths"]
    if not isinstance(rows, int) or not isinstance(lengths, list) or not 0 < rows == len(lengths):
        # Before anything of that size is made.
        raise _damaged(folder, f"{INDEX_FILE} names {rows} rows, and not as many lengths")
    return index, text


def _refuse_other_model(own: dict[str, Any], written: Any, folder: str | os.PathLike[str]) -> None:
    # Memories that do not name a factor were written before there was one.
    named = {"score_factor": 1.0, **written} if isinstance(written, dict) else {}
    if named == own:
        return
    different = [name for name in own if named.get(name) != own[name]]
    raise SettingError(
        "folder",
        str(folder),
        f"the memory was made by another model: {', '.join(different)} differ"
        f" ({', '.join(f'{name}: {named.get(name)} there, {own[name]} here' for name in different)})",
        "Load the model and settings that wrote it, or ingest the documents again.",
    )


def _read_checked(source: Path, named: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source / str(named["file"])
    if not _DATA_FILE.fullmatch(str(named["file"])):
        raise _damaged(folder, f"{INDEX_FILE} names {named['file']!r}, which is no data file of a memory")
    try:
        if file_digest(path) != named["sha256"]:
            raise _damaged(folder, f"{path.name} is missing, cut short or altered")
        return load_file(path)
    except FileNotFoundError as error:
        raise _damaged(folder, f"{path.name} is missing, cut short or altered") from error
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, f"{path.name} cannot be read: {error}") from error


def _damaged(folder: str | os.PathLike[str], reason: str) -> SettingError:
    return SettingError("folder", str(folder), f"the memory is damaged: {reason}", "Ingest the documents again.")


def _write(target: Path, kind: str, entries: list[Entry]) -> dict[str, Any]:
    """Writes a data file under a name of its content; gives its name and digest."""
    with workspace(target / kind) as place:
        with (place / kind).open("wb") as stream:
            digest = write_tensors(stream, entries)
        name = f"{kind}-{digest[:16]}.safetensors"
        publish(place / kind, target / name)
    return {"file": name, "sha256": digest}


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
