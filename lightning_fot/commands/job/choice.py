"""Chooses the folder of a run, and the checkpoint it goes on from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from lightning_fot.errors import SettingError
from lightning_fot.request.request import Request
from lightning_fot.system.ranks import rank, shared_folder
from lightning_fot.training.run_folder import ROOT, RunFolder


def choose(request: Request) -> tuple[RunFolder, Path | None]:
    """The run folder, and the checkpoint to go on from.

    Without ``ckpt_path`` an earlier run is never written into: a new number is taken. ``ckpt_path=last`` goes on in the
    folder given, or in the newest of this configuration.

    Returns:
        Folder and checkpoint; the checkpoint is None for a run from the start, and for going on with the evaluation of
        a model that was not trained.

    Raises:
        SettingError: There is no such checkpoint.
    """
    word, run_dir = request.get("ckpt_path"), request.get("run_dir")
    named = None if word is None else Path(str(word)).expanduser()
    if (shared := shared_folder()) is not None:
        # Rank 0 has made it already: this rank neither takes another nor finds it used.
        folder = RunFolder(shared)
        return folder, _last(folder) if word == "last" else named
    base = _base(request)
    if word == "last":
        newest = _newest(_attempts(base) if run_dir is None else [RunFolder(base)])
        if newest is None:
            where = base if run_dir is not None else f"{base}*"
            fix = "Leave it out to start from the beginning."
            raise SettingError("ckpt_path", "last", f"there is no last.ckpt in {where}/checkpoints", fix)
        request.notes.append(f"Going on in {newest.path}.")
        return newest, _last(newest)
    if named is not None and not named.is_file():
        raise SettingError(
            "ckpt_path", word, "no such file", "Give a checkpoint, or 'last' for the run folder's newest one."
        )
    # Of processes that were started together, those of other ranks write nothing there.
    folder = _unused(base) if rank() == 0 else RunFolder(base)
    if folder.path != base:
        request.notes.append(f"{base} holds an earlier run: writing to {folder.path}.")
    return folder, named


@contextmanager
def claimed(request: Request, folder: RunFolder) -> Iterator[RunFolder]:
    """The run folder, for as long as the block takes this process's alone.

    Where another process has taken it since it was chosen, a run from the start gets the next number.

    Args:
        request: The command line; its notes say where the number is another.
        folder: As :func:`choose` gave it.

    Raises:
        SettingError: Another process works in the folder of the run that is to go on, or it cannot be written.
    """
    if rank() != 0:
        # Rank 0 has it, for all of them.
        yield folder
        return
    goes_on = request.get("ckpt_path") == "last"
    chosen, taken = folder.path, set[Path]()
    try:
        while (held := folder.claim()) is None or (folder.used and not goes_on):
            if held is not None:
                # Since it was chosen, another run has begun there and ended.
                folder.release(held)
            elif goes_on:
                raise SettingError("run_dir", str(chosen), "another process is writing to it", "Wait until it is done.")
            taken.add(folder.path)
            folder = _unused(_base(request), taken)
        if taken:
            request.notes.append(f"Another process has just taken {chosen}: writing to {folder.path}.")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise SettingError("run_dir", str(folder.path), problem, "Choose another folder.") from error
    try:
        yield folder
    finally:
        folder.release(held)


def _base(request: Request) -> Path:
    """Where the first attempt goes."""
    run_dir = request.get("run_dir")
    return ROOT / request.name if run_dir is None else Path(str(run_dir)).expanduser()


def _last(folder: RunFolder) -> Path | None:
    """The folder's last checkpoint; None where the model was not trained."""
    return folder.last_checkpoint if folder.last_checkpoint.is_file() else None


def _numbered(base: Path, number: int) -> Path:
    """Where the attempt of this number goes: ``base``, ``base-2``, ``base-3``…"""
    if number == 1:
        return base
    return base.with_name(f"{base.name}-{number}") if base.name else base / f"run-{number}"


def _unused(base: Path, taken: Collection[Path] = ()) -> RunFolder:
    """The first attempt's folder that no run has been in, and that no other process has ``taken``."""
    folders = (RunFolder(_numbered(base, number)) for number in count(1))
    return next(folder for folder in folders if folder.path not in taken and not folder.used)


def _attempts(base: Path) -> list[RunFolder]:
    """The folders of all attempts that there are."""
    name = re.compile(re.escape(base.name) + r"(-\d+)?")
    there = base.parent.iterdir() if base.parent.is_dir() else ()
    return [RunFolder(path) for path in there if path.is_dir() and name.fullmatch(path.name)]


def _newest(folders: list[RunFolder]) -> RunFolder | None:
    """The newest of the folders that can be gone on with; None where there is none."""
    return max((folder for folder in folders if folder.resumable), key=_changed, default=None)


def _changed(folder: RunFolder) -> float:
    """When what can be gone on with was written last."""
    return max(path.stat().st_mtime for path in (folder.last_checkpoint, folder.partial) if path.exists())
