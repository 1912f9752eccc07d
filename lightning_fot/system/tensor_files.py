"""Writes safetensors files piece by piece: ``save_file`` wants all at once, and a memory may be larger than RAM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_fot.system.digests import blank_metadata, check_tensors, seal_tensors
from lightning_fot.system.files import writing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass
class Entry:
    """One tensor of a file.

    Args:
        name: Its key.
        dtype: Its dtype.
        shape: Its shape.
        pieces: Tensors that follow each other in memory and make up the whole.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterator[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(stream: BinaryIO, entries: Sequence[Entry]) -> str:
    """Writes a safetensors file (format: github.com/huggingface/safetensors, "Format").

    Args:
        stream: Open for writing.
        entries: What to write; pieces are taken one after the other and let go.

    Returns:
        SHA-256 of the file.

    Raises:
        ValueError: The pieces of an entry are not as long as its shape says.
    """
    header, offset = {}, 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        digest.update(part)
        stream.write(part)
    for entry in entries:
        written = 0
        for piece in entry.pieces:
            content = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            stream.write(content)
            written += len(content)
        if written != entry.nbytes:
            raise ValueError(f"{entry.name}: {written} bytes written, its shape {entry.shape} has {entry.nbytes}")
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whole, with its digest in the metadata.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors.torch import save_file

    with writing(path) as fresh:
        save_file(dict(tensors), fresh, blank_metadata(metadata))
        seal_tensors(fresh)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file that is what was written, as far as it says.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file, or was altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_tensors(path)
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
