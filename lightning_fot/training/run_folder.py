"""The folder of a run: which one, what is in it, and writing it so that a crash leaves no half file.

Imports nothing heavy: the folder is chosen, and checked, before torch loads.
"""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lightning_fot.system.digests import read_sealed, write_sealed
from lightning_fot.system.files import lock, writing

ROOT = Path("runs")
_CONTENTS = ("config.yaml", "results.json", "training.json", "checkpoints", "evaluation", "logs", "metrics.csv")


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
        self._lock = path / ".lock"

    @property
    def used(self) -> bool:
        """Whether an earlier run left something here."""
        return any((self.path / name).exists() for name in _CONTENTS)

    def claim(self) -> IO[str] | None:
        """Takes the folder, which is made where it is missing, until :meth:`release`; None where another has it.

        Raises:
            OSError: It cannot be written.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                return lock(self._lock)
            except FileNotFoundError:
                continue  # Another process has released it, and left nothing, between the two calls.

    def release(self, held: IO[str]) -> None:
        """Gives the folder back, and removes it where nothing was written into it."""
        with held, suppress(OSError):
            self._lock.unlink()
            self.path.rmdir()

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

    def write_training(self, results: dict[str, Any]) -> None:
        """Keeps what is known of a training that has ended."""
        write_sealed(self.training, results)

    def read_partial(self, fingerprint: str) -> dict[str, Any]:
        """Records of finished evaluation phases, if they were made with the same settings and weights."""
        found = _read_json(self.partial) or {}
        records = found.get("records", {})
        return dict(records) if found.get("fingerprint") == fingerprint else {}

    def write_partial(self, fingerprint: str, records: dict[str, Any]) -> None:
        """Keeps the records of finished evaluation phases."""
        write_sealed(self.partial, {"fingerprint": fingerprint, "records": records})

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
        with writing(self.metrics) as fresh, fresh.open("w", newline="", encoding="utf-8") as target:
            writer = csv.DictWriter(target, names, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is none, and where it is damaged or altered: it is made again then."""
    try:
        return read_sealed(path)
    except (OSError, ValueError):
        return None
