"""Chooses the folder of a run, and the checkpoint it goes on from."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def _fresh(base: Path) -> RunFolder:
    folder = RunFolder(base)
    number = 2
    while folder.used:
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
