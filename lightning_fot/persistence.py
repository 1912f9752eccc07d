"""Memories on disk: safetensors and JSON, written so that a kill at any moment leaves the old memory or the new one.

The folder holds ``memory.json``, which names a data file ``memory-<digest>.safetensors`` and its SHA-256. Data are
written first, under a name of their own; then ``memory.json`` is replaced, which file systems do whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot.lm import MemoryLM
    from lightning_fot.memory import Memory

FORMAT = 1
INDEX_FILE = "memory.json"


def fingerprint(lm: MemoryLM) -> dict[str, Any]:
    """What a memory must share with the model that reads it, JSON-able.

    Keys depend on the weights of the memory layers (and of those below), so their digest is part of it.
    """
    digest = hashlib.sha256()
    for index in lm.memory_layers:
        for name, parameter in sorted(lm.attachment.attentions[index].named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model_type": str(lm.model.config.get_text_config().model_type),
        "memory_layers": list(lm.memory_layers),
        "kv_heads": [lm.attachment.facts[index].kv_heads for index in lm.memory_layers],
        "head_dim": [lm.attachment.facts[index].head_dim for index in lm.memory_layers],
        "positions": lm.config.positions,
        "weights": digest.hexdigest(),
    }


def save_memory(memory: Memory, folder: str | os.PathLike[str]) -> None:
    """Writes a memory; one already in the folder is replaced at once or not at all.

    Args:
        memory: What to save.
        folder: Made where it is missing.

    Raises:
        SettingError: The folder cannot be written, or the memory was not made by a model.
    """
    from safetensors.torch import save_file

    if memory.fingerprint is None:
        raise SettingError("memory", repr(memory), "belongs to no model", "Make it with the model's new_memory.")
    target = Path(folder)
    tensors: dict[str, Tensor] = {"lengths": memory.lengths, "tokens_seen": memory.tokens_seen}
    for number, layer in memory.layers.items():
        tensors[f"{number}.keys"] = layer.keys.contiguous().cpu()
        tensors[f"{number}.values"] = layer.values.contiguous().cpu()
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary)
            digest = _digest(Path(temporary))
            data_file = f"memory-{digest[:16]}.safetensors"
            _sync(Path(temporary))
            os.replace(temporary, target / data_file)
        finally:
            Path(temporary).unlink(missing_ok=True)
        index = {"format": FORMAT, "data": data_file, "sha256": digest, "fingerprint": memory.fingerprint()}
        _replace_text(target / INDEX_FILE, json.dumps(index, indent=1))
    except OSError as error:
        raise SettingError("folder", str(folder), f"cannot be written ({error})", "Choose another folder.") from error
    for old in target.glob("memory-*.safetensors"):
        if old.name != data_file:
            old.unlink(missing_ok=True)


def load_memory(lm: MemoryLM, folder: str | os.PathLike[str]) -> Memory:
    """Reads a memory that the same model wrote. Indexes are built again.

    Args:
        lm: The model that will read it.
        folder: As given to :func:`save_memory`.

    Raises:
        SettingError: There is none, it is damaged, or it belongs to another model.
    """
    from safetensors.torch import load_file

    source = Path(folder)
    index_file = source / INDEX_FILE
    if not index_file.is_file():
        raise SettingError("folder", str(folder), f"holds no {INDEX_FILE}", "Give a folder that Memory.save wrote.")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        data_file, digest, written = source / index["data"], index["sha256"], index["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{INDEX_FILE} cannot be read: {error}") from error
    if index.get("format") != FORMAT:
        raise SettingError("folder", str(folder), f"has format {index.get('format')}", f"This version reads {FORMAT}.")
    own = fingerprint(lm)
    if written != own:
        named = written if isinstance(written, dict) else {}
        different = [name for name in own if named.get(name) != own[name]]
        raise SettingError(
            "folder",
            str(folder),
            f"the memory was made by another model: {', '.join(different)} differ"
            f" ({', '.join(f'{name}: {named.get(name)} there, {own[name]} here' for name in different)})",
            "Load the model and settings that wrote it, or ingest the documents again.",
        )
    if not data_file.is_file() or _digest(data_file) != digest:
        raise _damaged(folder, f"{data_file.name} is missing, cut short or altered")
    tensors = load_file(data_file)
    memory = lm.new_memory(len(tensors["lengths"]))
    pairs = {number: (tensors[f"{number}.keys"], tensors[f"{number}.values"]) for number in memory.layers}
    if int(tensors["lengths"].max()):
        memory.append(pairs, tensors["lengths"])
    memory.tokens_seen = tensors["tokens_seen"]
    return memory


def _damaged(folder: str | os.PathLike[str], reason: str) -> SettingError:
    return SettingError("folder", str(folder), f"the memory is damaged: {reason}", "Ingest the documents again.")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _replace_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
