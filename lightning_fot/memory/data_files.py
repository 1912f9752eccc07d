"""Data files of a memory on disk: pairs as they are stored, in safetensors, under names of their content."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.memory.layer import MemoryLayer
from lightning_fot.retrievers.keys.quantiser import Quantiser
from lightning_fot.system.digests import file_digest
from lightning_fot.system.files import publish, workspace
from lightning_fot.system.tensor_files import Entry, write_tensors

if TYPE_CHECKING:
    from lightning_fot.retrievers.keys.store import KeyStore

INDEX_FILE = "memory.json"
# What a data file is called: an index may name no other file, and so none of other folders.
DATA_FILE = re.compile(r"(?:memory|log)-[0-9a-f]{16}\.safetensors")

_CODING = (".centre", ".spread")

Named = Mapping[str, Any]
# Of one row, in order: the shard of the pairs, the first of them there, and the one behind the last.
Stretches = Sequence[tuple[int, int, int]]


def write_file(target: Path, kind: str, entries: list[Entry]) -> dict[str, Any]:
    """Writes a data file under a name of its content; gives its name and digest.

    Raises:
        OSError: It cannot be written.
    """
    with workspace(target / kind) as place:
        with (place / kind).open("wb") as stream:
            digest = write_tensors(stream, entries)
        name = f"{kind}-{digest[:16]}.safetensors"
        publish(place / kind, target / name)
    return {"file": name, "sha256": digest}


def read_file(source: Path, named: Named, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A data file that an index names, mapped.

    Raises:
        SettingError: It is missing, altered, or no data file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source / str(named["file"])
    if not DATA_FILE.fullmatch(str(named["file"])):
        raise damaged(folder, f"{INDEX_FILE} names {named['file']!r}, which is no data file of a memory")
    try:
        if file_digest(path) != named["sha256"]:
            raise damaged(folder, f"{path.name} is missing, cut short or altered")
        return load_file(path)
    except FileNotFoundError as error:
        raise damaged(folder, f"{path.name} is missing, cut short or altered") from error
    except (OSError, SafetensorError) as error:
        raise damaged(folder, f"{path.name} cannot be read: {error}") from error


def damaged(folder: str | os.PathLike[str], reason: str) -> SettingError:
    """What to say of a folder whose memory cannot be read."""
    return SettingError("folder", str(folder), f"the memory is damaged: {reason}", "Ingest the documents again.")


def pair_entries(layers: Mapping[int, MemoryLayer], start: Sequence[int], stop: Sequence[int]) -> list[Entry]:
    """Pairs ``start[b]`` to ``stop[b]`` of each row b of all layers, as they are stored."""
    entries = []
    for number, layer in layers.items():
        for name, store in _stores(layer):
            entries += _store_entries(f"{number}.{name}", layer, store, start, stop)
    return entries


def coding_tensors(layers: Mapping[int, MemoryLayer]) -> dict[str, Tensor]:
    """What eight-bit vectors were coded with; nothing for other dtypes."""
    tensors = {}
    for number, layer in layers.items():
        for name, store in _stores(layer):
            if store.quantiser is not None:
                tensors[f"{number}.{name}.centre"] = store.quantiser.centre
                tensors[f"{number}.{name}.spread"] = store.quantiser.spread
    return tensors


def tensor_entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Tensors that are there as a whole."""
    return [Entry(name, tensor.dtype, tuple(tensor.shape), iter([tensor])) for name, tensor in tensors.items()]


def fill(
    layers: Mapping[int, MemoryLayer], files: Sequence[tuple[Named, Mapping[str, Tensor]]], coded: Mapping[str, Tensor]
) -> None:
    """Gives empty layers all pairs of files that follow each other.

    Args:
        layers: By number.
        files: What the index says of each, and what is in it.
        coded: As :func:`coding_tensors` gave it.

    Raises:
        KeyError, ValueError, TypeError, IndexError: They do not fit together.
    """
    for named, tensors in files:
        for number, layer in layers.items():
            counts = [b - a for a, b in zip(named["start"], named["stop"], strict=True)]
            per_bank = [count for count in counts for _ in range(layer.kv_heads)]
            for name, store in _stores(layer):
                key = f"{number}.{name}"
                if f"{key}.centre" in coded:
                    centre, spread = coded[f"{key}.centre"], coded[f"{key}.spread"]
                    store.quantiser = Quantiser(centre.to(store.device), spread.to(store.device))
                data, scales = tensors[key].to(store.device), tensors.get(f"{key}.scales")
                scales = None if scales is None else scales.to(store.device)
                if len(files) == 1:
                    store.adopt(data, scales, per_bank)
                else:
                    store.append_raw(data, scales, per_bank)
    for layer in layers.values():
        layer.retriever.renumber()


class Parts:
    """Files that shards have written, to be put together otherwise.

    Args:
        source: The folder.
        named: What the index says of the files, in the order in which each shard wrote them.
        folder: The folder in the user's words.

    Raises:
        SettingError: A file is missing or altered.
    """

    def __init__(self, source: Path, named: Sequence[Named], folder: str | os.PathLike[str]) -> None:
        self._by_shard: dict[int, list[tuple[Named, dict[str, Tensor]]]] = {}
        for one in named:
            tensors = read_file(source, one, folder)
            if "coding" in one:
                # One process writes what its vectors were coded with beside the log.
                beside = read_file(source, one["coding"], folder)
                tensors |= {name: part for name, part in beside.items() if name.endswith(_CODING)}
            self._by_shard.setdefault(int(one["shard"]), []).append((one, tensors))

    def fill(self, layers: Mapping[int, MemoryLayer], rows: Sequence[Stretches]) -> None:
        """Gives empty layers the pairs of each row that its stretches name, in that order.

        Raises:
            KeyError, ValueError, TypeError, IndexError: The files do not fit together.
        """
        if self._is_whole(rows):
            files = next(iter(self._by_shard.values()))
            coded = files[-1][1]
            names = [name for name in coded if name.endswith(_CODING)]
            if all(torch.equal(tensors[name], coded[name]) for _, tensors in files for name in names):
                fill(layers, files, coded)
                return
        for number, layer in layers.items():
            keys, values = (self._joined(f"{number}.{name}", layer, rows) for name in ("keys", "values"))
            counts = [sum(stop - start for _, start, stop in row) for row in rows]
            layer.append(keys, values, torch.tensor(counts))

    def _is_whole(self, rows: Sequence[Stretches]) -> bool:
        """Whether it is all that one shard holds, in its order."""
        if len(self._by_shard) != 1:
            return False
        ((shard, files),) = self._by_shard.items()
        ends = files[-1][0]["stop"]
        whole: list[list[tuple[int, int, int]]] = [[(shard, 0, end)] if end else [] for end in ends]
        return [list(map(tuple, row)) for row in rows] == whole

    def _joined(self, name: str, layer: MemoryLayer, rows: Sequence[Stretches]) -> Tensor:
        """(B, G, M, D) in a floating dtype."""
        banks = []
        for row, stretches in enumerate(rows):
            for head in range(layer.kv_heads):
                bank = row * layer.kv_heads + head
                pieces = [
                    piece
                    for shard, start, stop in stretches
                    for piece in self._pieces(name, shard, row, bank, start, stop)
                ]
                dim = layer.key_dim if name.endswith("keys") else layer.value_dim
                banks.append(torch.cat(pieces) if pieces else torch.zeros(0, dim))
        longest = max(len(bank) for bank in banks)
        padded = [torch.cat([bank, bank.new_zeros(longest - len(bank), bank.shape[1])]) for bank in banks]
        return torch.stack(padded).reshape(len(rows), layer.kv_heads, longest, -1)

    def _pieces(self, name: str, shard: int, row: int, bank: int, start: int, stop: int) -> Iterator[Tensor]:
        """Vectors ``start`` to ``stop`` of a row of a shard, from one file after the other."""
        for named, tensors in self._by_shard[shard]:
            first, last = int(named["start"][row]), int(named["stop"][row])
            low, high = max(start, first) - first, min(stop, last) - first
            if low >= high:
                continue
            data = tensors[name][bank, low:high]
            if data.dtype != torch.int8:
                yield data
                continue
            coding = Quantiser(tensors[f"{name}.centre"], tensors[f"{name}.spread"])
            yield coding.decode(data, tensors[f"{name}.scales"][bank, low:high], bank)


def _stores(layer: MemoryLayer) -> tuple[tuple[str, KeyStore], tuple[str, KeyStore]]:
    return ("keys", layer.key_store), ("values", layer.value_store)


def _store_entries(
    name: str, layer: MemoryLayer, store: KeyStore, start: Sequence[int], stop: Sequence[int]
) -> list[Entry]:
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
