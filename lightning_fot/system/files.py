"""Writes files and folders whole: whoever looks sees the old one or the new one, whatever is killed and whenever.

What is written grows in a workspace, a folder ``.NAME.….part`` beside the target, and takes its name at the end: first
its bytes reach the disk, then the new name does. A workspace is locked for as long as its writer lives. One that nobody
holds was left by a kill, and the next write of the same target removes it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_fot.errors import SettingError

# Names may have 255 bytes; the workspace's name holds the target's and this much more.
_LONGEST_NAME = 200
_MARK = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.part", re.DOTALL)
_OLD = ".old"


@contextmanager
def writing(target: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write a file at, which takes the name ``target`` when the block ends, and is gone when it fails.

    Args:
        target: The file; its folder is made where it is missing.
        durable: Whether it has to outlive a power cut that follows at once. What can be made again need not.

    Raises:
        OSError: It cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with workspace(target) as place:
        fresh = place / target.name
        yield fresh
        publish(fresh, target, durable)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name ``target`` when all is written.

    Raises:
        SettingError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with workspace(target) as place:
            fresh = place / target.name
            fresh.mkdir()
            yield fresh
            _publish_folder(fresh, target, place / _OLD)
    except OSError as error:
        raise SettingError("folder", str(target), f"cannot be written ({error})", "Choose another folder.") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    with writing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def append_bytes(path: Path, data: bytes, durable: bool) -> None:
    """Adds bytes to a file, which is made where it is missing. For what grows: a kill may leave a part of them.

    Args:
        path: The file.
        data: What to add.
        durable: Whether the file, with all that was added before, has to outlive a power cut that follows at once.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab") as file:
        file.write(data)
    if durable:
        sync(path)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole or not at all; numbers that JSON does not have become null."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as files hold it: indented, in UTF-8, null for numbers that JSON does not have."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def lock(path: Path) -> IO[str] | None:
    """Locks a file, which is made where it is missing, to say that its folder has a writer.

    The lock is held until what is returned is closed, or the process ends, however it ends. Where the system, or its
    file system, has no such locks, nobody is kept out.

    Args:
        path: In a folder that is there.

    Returns:
        None where another process, or another call, holds it.

    Raises:
        OSError: It cannot be written.
    """
    while True:
        file = path.open("w")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return file
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            return file
        # Whoever held it before may have removed it between the two calls.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write in; it is removed when the block ends, and so are those of killed writers.

    For what gets its name only once it is written; :func:`publish` then moves it. Else use :func:`writing`.
    """
    clean(target.parent, target.name)
    place, lock = _new_workspace(target)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def publish(fresh: Path, target: Path, durable: bool = True) -> None:
    """Gives a file that was written in a workspace its name, with the permissions that ``open`` gives to new files."""
    # Some libraries write for the owner alone. A new folder tells what is usual; asking umask itself would change it
    # for other threads.
    fresh.chmod(fresh.parent.stat().st_mode & 0o666)
    if durable:
        sync(fresh)
    os.replace(fresh, target)
    if durable:
        sync(target.parent)


def _publish_folder(fresh: Path, target: Path, old: Path) -> None:
    mode = fresh.stat().st_mode
    for path in fresh.rglob("*"):
        # As public as any folder, whatever the libraries that wrote into it do.
        path.chmod(mode & (0o777 if path.is_dir() else 0o666))
        sync(path)
    sync(fresh)
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)


def clean(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers left in a folder.

    A folder that a killed writer had moved aside to replace it gets its name back where nothing has taken it.

    Args:
        folder: Where to look, not below it.
        name: Of the target whose leftovers count; None takes all.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, match) for entry in entries if (match := _MARK.fullmatch(entry.name))]
    for left, match in found:
        if name is not None and match["target"] != _shortened(name):
            continue
        with suppress(OSError):
            lock = _hold(folder / left)
            if lock is None:
                continue
            try:
                target = folder / match["target"]
                if (folder / left / _OLD).exists() and not target.exists():
                    (folder / left / _OLD).rename(target)
                shutil.rmtree(folder / left, ignore_errors=True)
            finally:
                os.close(lock)


def is_unfinished(path: Path) -> bool:
    """Whether a path has the name of a workspace."""
    return _MARK.fullmatch(path.name) is not None


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])


def _new_workspace(target: Path) -> tuple[Path, int | None]:
    while True:
        place = target.parent / f".{_shortened(target.name)}.{secrets.token_hex(8)}.part"
        place.mkdir()
        try:
            lock = _hold(place)
        except FileNotFoundError:
            continue  # Between these two lines a cleaner took it for one that nobody holds.
        except OSError:
            return place, None  # The file system has no locks: leftovers stay there.
        if lock is None and _can_lock():
            continue
        return place, lock


def _can_lock() -> bool:
    return os.name == "posix"


def _hold(place: Path) -> int | None:
    """Locks a workspace; None where somebody else holds it, or nobody can.

    Raises:
        OSError: It is gone, or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None  # not on this system
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A cleaner may have removed it between the two calls.
        if os.path.samestat(os.fstat(handle), os.stat(place)):
            return handle
    except BlockingIOError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems know no fsync of folders; an error of a file's bytes counts.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
