"""The folder of a run: which one, what is in it, and writing it so that a crash leaves no half file.

Imports nothing heavy: the folder is chosen, and checked, before torch loads.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError
from lightning_fot.permissions import follow_umask
from lightning_fot.ranks import rank, shared_folder
from lightning_fot.request import Request

ROOT = Path("runs")
_CONTENTS = ("config.yaml", "results.json", "training.json", "checkpoints", "evaluation", "logs", "metrics.csv")


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


class RunFolder:
    """Paths and state of a run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.results = path / "results.json"
        self.metrics = path / "metrics.csv"
        self.checkpoints = path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.training = path / "training.json"
        self.partial = path / "evaluation" / "partial.json"

    @property
    def used(self) -> bool:
        """Whether an earlier run left something here."""
        return any((self.path / name).exists() for name in _CONTENTS)

    @property
    def resumable(self) -> bool:
        """Whether there is something to go on from: a checkpoint, or an evaluation of an untrained model."""
        return self.last_checkpoint.is_file() or (self.trained_steps == 0 and self.partial.is_file())

    @property
    def trained_steps(self) -> int | None:
        """Steps of a training that has ended; None if it has not."""
        found = self.read_training()
        return None if found is None else int(found["steps"])

    def read_training(self) -> dict[str, Any] | None:
        """What is known of a training that has ended."""
        return _read_json(self.training)

    def read_partial(self, fingerprint: str) -> dict[str, Any]:
        """Records of finished evaluation phases, if they were made with the same settings and weights."""
        found = _read_json(self.partial) or {}
        records = found.get("records", {})
        return dict(records) if found.get("fingerprint") == fingerprint else {}

    def write_partial(self, fingerprint: str, records: dict[str, Any]) -> None:
        """Keeps the records of finished evaluation phases."""
        write_json(self.partial, {"fingerprint": fingerprint, "records": records})

    def log_version(self) -> str:
        """Name of the next attempt's folder of logs."""
        taken = [int(folder.name.rpartition("_")[2]) for folder in self._logs()]
        return f"version_{max(taken, default=-1) + 1}"

    def _logs(self) -> list[Path]:
        folders = [path for path in (self.path / "logs").glob("version_*") if path.name[8:].isdigit()]
        return sorted(folders, key=lambda path: int(path.name[8:]))

    def write_metrics(self) -> None:
        """Joins the logs of all attempts in ``metrics.csv``; where attempts overlap, the later one counts."""
        rows: list[dict[str, str]] = []
        for folder in self._logs():
            file = folder / "metrics.csv"
            if not file.is_file():
                continue
            with file.open(newline="", encoding="utf-8") as source:
                new = list(csv.DictReader(source))
            steps = [int(row["step"]) for row in new if row.get("step", "").isdigit()]
            if steps:
                rows = [row for row in rows if not row.get("step", "").isdigit() or int(row["step"]) < min(steps)]
            rows += new
        names = list(dict.fromkeys(["step", "epoch", "train/loss", *(name for row in rows for name in row)]))
        lines = [",".join(names)]
        lines += [",".join(row.get(name) or "" for name in names) for row in rows]
        write_text(self.metrics, "\n".join(lines) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
