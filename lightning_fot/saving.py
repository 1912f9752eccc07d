"""Writing an attached model as a plain Hugging Face folder.

Anyone opens the folder with ``AutoModelForCausalLM``, without this package, and has the backbone's logits.
:func:`lightning_fot.opening.attach_pretrained` opens it with its memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.delta import SETTINGS_FILE as DELTA_FILE
from lightning_fot.errors import SettingError
from lightning_fot.longllama import FORMAT, GATES_FILE, SETTINGS_FILE, longllama_keys
from lightning_fot.permissions import follow_umask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.config import MemoryConfig
    from lightning_fot.lm import MemoryLM

# Where a memory lies on one machine: not the model's.
_OF_THE_MACHINE = ("offload", "offload_dir")


def save_attached(
    lm: MemoryLM, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Writes weights, memory settings and gates; see :meth:`lightning_fot.lm.MemoryLM.save_pretrained`.

    The files are written beside ``folder`` and then take its name: stopped at any moment, ``folder`` is the old model,
    the new one or, for an instant between two renames, missing; never a mixture.

    Returns:
        The folder.

    Raises:
        SettingError: The retriever has no name, or the folder holds something else.
    """
    settings = portable_settings(lm.config)
    target = check_target(folder)
    with replacing(target) as fresh:
        _write(lm, fresh, settings, tokenizer)
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name ``target`` when all is written.

    Raises:
        SettingError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield fresh
            _publish(fresh)
            _replace(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise SettingError("folder", str(target), f"cannot be written ({error})", "Choose another folder.") from error


def portable_settings(config: MemoryConfig) -> dict[str, Any]:
    """The settings as JSON can hold them, without those of the machine.

    Raises:
        SettingError: The retriever is a Python object, which a file cannot name.
    """
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _OF_THE_MACHINE
    }
    try:
        json.dumps(settings["retriever"])
    except (TypeError, ValueError):
        raise SettingError(
            "model.memory.retriever",
            settings["retriever"],
            "is a Python object, which a saved model cannot name",
            'Set lm.config.retriever to a name, {"name": ..., **arguments} or "package.module.Class" before saving.',
        ) from None
    return settings


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder to write, as a real path.

    Raises:
        SettingError: It is a file, or holds anything but a model that this package saved.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise SettingError("folder", str(folder), "is a file", "Give a folder.")
    written = set[str]()
    for file in (SETTINGS_FILE, DELTA_FILE):
        with suppress(OSError, ValueError, KeyError, TypeError):
            written |= set(json.loads((target / file).read_text(encoding="utf-8"))["files"])
    foreign = sorted({path.name for path in target.iterdir()} - written)
    if foreign:
        raise SettingError(
            "folder",
            str(folder),
            f"holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}, which would be lost",
            "Choose another folder, or empty it.",
        )
    return target


def _write(lm: MemoryLM, folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    from safetensors.torch import save_file

    lm.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(lm.model.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config | longllama_keys(lm.config, lm.memory_layers, dtype))
    if len(lm.gates):
        gates = {layer: gate.detach().cpu().contiguous() for layer, gate in lm.gates.items()}
        save_file(gates, folder / GATES_FILE)
    files = sorted([*(path.name for path in folder.iterdir()), SETTINGS_FILE])
    _write_json(folder / SETTINGS_FILE, {"format": FORMAT, "memory": settings, "files": files})


def _publish(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    # mkdtemp and safetensors write for the owner alone; a model is as public as any folder.
    follow_umask(folder, *files)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(fresh: Path, target: Path) -> None:
    """Gives ``fresh`` the name ``target``; what had it is removed when the new folder is in its place."""
    if not target.exists():
        fresh.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
