"""Chooses the folder of a run, and the checkpoint it goes on from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_fot.errors import SettingError
from lightning_fot.request.request import Request
from lightning_fot.system.ranks import rank, shared_folder
from lightning_fot.training.run_folder import ROOT, RunFolder


def _numbered(base: Path) -> list[Path]:
    """``base`` and its siblings ``base-2``, ``base-3``… that exist."""
    pattern = re.compile(re.escape(base.name) + r"(-\d+)?")
    if not base.parent.is_dir():
        return []
    return [path for path in base.parent.iterdir() if path.is_dir() and pattern.fullmatch(path.name)]


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
    given = request.get("run_dir")
    if (shared := shared_folder()) is not None:
        # Rank 0 has made it already: this rank neither takes another nor finds it used.
        last = RunFolder(shared).last_checkpoint
        word = request.get("ckpt_path")
        named = None if word is None else Path(str(word)).expanduser()
        return RunFolder(shared), (last if last.is_file() else None) if word == "last" else named
    base = Path(str(given)).expanduser() if given is not None else ROOT / request.name
    checkpoint = request.get("ckpt_path")
    if checkpoint == "last":
        return _go_on(request, base, given is not None)
    if checkpoint is not None and not Path(str(checkpoint)).expanduser().is_file():
        raise SettingError(
            "ckpt_path", checkpoint, "no such file", "Give a checkpoint, or 'last' for the run folder's newest one."
        )
    # Of processes that were started together, those of other ranks write nothing there.
    folder = _fresh(base) if rank() == 0 else RunFolder(base)
    if folder.path != base:
        request.notes.append(f"{base} holds an earlier run: writing to {folder.path}.")
    return folder, None if checkpoint is None else Path(str(checkpoint)).expanduser()


@contextmanager
def claimed(request: Request, folder: RunFolder, checkpoint: Path | None) -> Iterator[RunFolder]:
    """The run folder, for as long as the block takes this process's alone.

    Where another process has taken it since it was chosen, a run from the start gets the next number.

    Args:
        request: The command line; its notes say where the number is another.
        folder: As :func:`choose` gave it.
        checkpoint: As :func:`choose` gave it.

    Raises:
        SettingError: Another process works in the folder of the run that is to go on, or it cannot be written.
    """
    if rank() != 0:
        # Rank 0 has it, for all of them.
        yield folder
        return
    goes_on = request.get("ckpt_path") == "last"
    base = folder
    try:
        while (held := folder.claim()) is None or (folder.used and not goes_on):
            if held is not None:
                # Since it was chosen, another run has begun there and ended.
                folder.release(held)
            elif goes_on:
                raise SettingError(
                    "run_dir", str(folder.path), "another process is writing to it", "Wait until it is done."
                )
            folder = _fresh(base.path, taken=folder.path)
        if folder.path != base.path:
            request.notes.append(f"Another process has just taken {base.path}: writing to {folder.path}.")
    except OSError as error:
        raise SettingError(
            "run_dir", str(folder.path), f"cannot be written ({error.strerror})", "Choose another folder."
        ) from error
    try:
        yield folder
    finally:
        folder.release(held)


def _fresh(base: Path, taken: Path | None = None) -> RunFolder:
    """The first of ``base``, ``base-2``, … that no run has used; with ``taken`` the first behind that one."""
    folder = RunFolder(base)
    number = 2
    while folder.used or taken is not None:
        if folder.path == taken:
            taken = None
        folder = RunFolder(base.with_name(f"{base.name}-{number}") if base.name else base / f"run-{number}")
        number += 1
    return folder


def _go_on(request: Request, base: Path, given: bool) -> tuple[RunFolder, Path | None]:
    candidates: Sequence[RunFolder] = [RunFolder(base)] if given else [RunFolder(path) for path in _numbered(base)]
    found = [folder for folder in candidates if folder.resumable]
    if not found:
        where = str(base / "checkpoints") if given else f"{base}*/checkpoints"
        raise SettingError(
            "ckpt_path", "last", f"there is no last.ckpt in {where}", "Leave it out to start from the beginning."
        )
    newest = max(found, key=lambda folder: _age(folder))
    request.notes.append(f"Going on in {newest.path}.")
    return newest, newest.last_checkpoint if newest.last_checkpoint.is_file() else None


def _age(folder: RunFolder) -> float:
    return max(path.stat().st_mtime for path in (folder.last_checkpoint, folder.partial) if path.exists())
