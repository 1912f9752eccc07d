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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lightning_fot.errors import SettingError
from lightning_fot.memory.card import CARD, write_card
from lightning_fot.memory.data_files import DATA_FILE, INDEX_FILE, damaged, read_file, tensor_entries, write_file
from lightning_fot.memory.token_log import TokenLog
from lightning_fot.system.digests import sealed, unsealed
from lightning_fot.system.files import clean, json_text, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot.memory.base import BaseLayer
    from lightning_fot.memory.place import Place

FORMAT = 2
# The same in eight bits. A scale below zero says that a vector is coded alone, which earlier versions do not know.
CODED = 3
# Pairs written by shards: the index says which shard holds which pairs of a row.
SHARDED = 4
# A folder of more data files than this is written anew as one.
MOST_FILES = 64
# How often a reader begins again because a writer has saved meanwhile.
_READS = 20
# Temporary files of versions before 0.2, which kills left.
_OLD_LEFTOVERS = "tmp????????.part"

# Digest of the index that a folder was given, and how far each row is in it.
Saved = tuple[str, list[int]]


class Stored(Protocol):
    """What is saved and loaded: a :class:`~lightning_fot.memory.memory.Memory`."""

    layers: dict[int, BaseLayer]
    log: TokenLog
    saved: dict[str, Saved]
    place: Place

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
        pairs = memory.place.write(memory.layers, target, _already_there(memory, target), lengths)
        in_use = memory.place.in_use(target)
        before += [name for name in older if name in in_use and name not in before]
        log, documents = memory.log.state()
        log_file = write_file(target, "log", tensor_entries({**log, **pairs.tensors}))
        plain = CODED if any(any(layer.codings) for layer in memory.layers.values()) else FORMAT
        index = {
            "format": SHARDED if "placement" in pairs.extra else plain,
            "fingerprint": fingerprint,
            "rows": len(lengths),
            "lengths": lengths,
            "pairs": pairs.files,
            **pairs.extra,
            "log": log_file,
            "documents": documents,
            "before": before,
        }
        text = json_text(sealed(index))
        # Before the index, so that what fails leaves the memory that was there.
        write_card(target, fingerprint, lengths, [(one["name"], one["first"] + one["kept"]) for one in documents])
        write_text(target / INDEX_FILE, text)
    except OSError as error:
        raise SettingError("folder", str(folder), f"cannot be written ({error})", "Choose another folder.") from error
    memory.saved = {str(target.resolve()): (_text_digest(text), lengths)}
    named = {file["file"] for file in (*pairs.files, log_file)}
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
    return [INDEX_FILE, *filter(DATA_FILE.fullmatch, named), *([CARD] if (folder / CARD).is_file() else [])]


def _named_before(target: Path) -> tuple[list[str], list[str]]:
    """Data files that the index in the folder names, and those that the one before it did."""
    try:
        index = unsealed(target / INDEX_FILE, (target / INDEX_FILE).read_text(encoding="utf-8"))
        now = [str(file["file"]) for file in (*index["pairs"], index["log"])]
        older = [str(name) for name in index.get("before", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
    # Files that are not named as ours are nobody's to remove.
    return list(filter(DATA_FILE.fullmatch, now)), list(filter(DATA_FILE.fullmatch, older))


def _already_there(memory: Stored, target: Path) -> dict[str, Any]:
    """The index of the folder where its data files hold the start of this memory; empty otherwise."""
    known = memory.saved.get(str(target.resolve()))
    index_file = target / INDEX_FILE
    if known is None or not index_file.is_file():
        return {}
    text = index_file.read_text(encoding="utf-8")
    if _text_digest(text) != known[0]:
        return {}
    index: dict[str, Any] = json.loads(text)
    files = index["pairs"]
    if len(files) >= MOST_FILES or not all((target / file["file"]).is_file() for file in files):
        return {}
    return index


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
        log = read_file(source, index["log"], folder)
        memory.log = TokenLog.restore(log, index["documents"])
        # It may have been written while one was being read.
        memory.log.end_named()
        memory.place.read(memory.layers, source, index, log, folder)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise damaged(folder, f"its files do not fit together: {error}") from error
    if memory.lengths.tolist() != (index["lengths"] if memory.layers else [0] * index["rows"]):
        raise damaged(folder, "its files hold more or fewer tokens than memory.json says")
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
        raise damaged(folder, f"{INDEX_FILE} cannot be read: {error}") from error
    if written not in (FORMAT, CODED, SHARDED):
        readable = f"{FORMAT} to {SHARDED}"
        raise SettingError(
            "folder", str(folder), f"has format {written}, this version reads {readable}", "Ingest the documents again."
        )
    missing = {"fingerprint", "rows", "lengths", "pairs", "log", "documents"} - index.keys()
    if missing:
        raise damaged(folder, f"{INDEX_FILE} lacks {', '.join(sorted(missing))}")
    rows, lengths = index["rows"], index["lengths"]
    if not isinstance(rows, int) or not isinstance(lengths, list) or not 0 < rows == len(lengths):
        # Before anything of that size is made.
        raise damaged(folder, f"{INDEX_FILE} names {rows} rows, and not as many lengths")
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


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
