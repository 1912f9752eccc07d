"""Who may read what is written: libraries that write by way of temporary files leave them to their owner alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError


def follow_umask(*paths: str | os.PathLike[str]) -> None:
    """Gives files and folders the permissions that ``open`` and ``mkdir`` give to new ones.

    Args:
        *paths: Each is there already.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in map(Path, paths):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        follow_umask(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole or not at all; numbers that JSON does not have become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


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


def _publish(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    # mkdtemp and safetensors write for the owner alone; a model is as public as any folder.
    follow_umask(folder, *files)


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


def _replace_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    follow_umask(temporary)
    os.replace(temporary, path)
