"""``RunReport``: the page of ``lightning run`` for a Trainer of one's own, written anew as the training goes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L

from lightning_fot.callbacks.probe import RetrievalProbe
from lightning_fot.callbacks.sampled import SampledCallback
from lightning_fot.config.retriever import retriever_label
from lightning_fot.errors import SettingError
from lightning_fot.training.module import FocusedTransformer

_LOSS = "train/loss"


class RunReport(L.Callback):
    """Writes ``report.html``, ``results.json`` and ``metrics.csv`` after each validation and test and at the end.

    The page is the self-contained one of ``lightning run``: what was run, the loss curves, the first and last value of
    everything logged, and the tables of a :class:`~lightning_fot.callbacks.RetrievalRecall` or
    :class:`~lightning_fot.callbacks.RetrievalSpeed` in the same Trainer. It needs no logger, works with any module that
    logs, and is written by rank 0 alone. In training it keeps what is logged every ``log_every_n_steps``; nothing is
    computed for it. What it keeps is a part of checkpoints, so that the page of a resumed training shows all of it.
    With ``fast_dev_run`` it writes nothing.

    Args:
        folder: Where to write; None takes ``report`` in the folder of the first logger, or in ``default_root_dir``.
            ``lightning report FOLDER`` makes the page anew from it.
        title: Heading of the page; None names the backbone.

    Attributes:
        written: The page that was written last; None before.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[RunReport()], logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, title: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.title = title
        self.written: Path | None = None
        self._rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._began: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a folder that cannot be one, before hours of training.

        Raises:
            SettingError: There is a file in its place.
        """
        folder = self._folder(trainer)
        if folder.is_file():
            raise SettingError("RunReport.folder", str(folder), "is a file", "Give a folder.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps what was logged, as often as loggers do."""
        step = trainer.global_step
        every: int = getattr(trainer, "log_every_n_steps", 50)
        if step and (step == 1 or step % max(1, every) == 0):
            self._keep(trainer, step - 1, "val/", "test/")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page."""
        if not trainer.sanity_checking:
            self._keep(trainer, max(0, trainer.global_step - 1))
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page."""
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page."""
        self._keep(trainer, max(0, trainer.global_step - 1), "val/", "test/")
        self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What was kept."""
        return {"rows": [dict(row) for row in self._rows], "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._seconds = float(state_dict["seconds"])

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def _folder(self, trainer: L.Trainer) -> Path:
        if self.folder is not None:
            return self.folder
        logged = next((logger.log_dir for logger in trainer.loggers if getattr(logger, "log_dir", None)), None)
        return Path(logged or trainer.default_root_dir) / "report"

    def _keep(self, trainer: L.Trainer, step: int, *without: str) -> None:
        """A row of what is logged now; one step has one row."""
        if not trainer.is_global_zero:
            return
        found = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith(without)}
        row = {name: float(value) for name, value in found.items() if value.numel() == 1}
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1] |= row
        elif row:
            self._rows.append({"step": float(step), **row})

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        from lightning_fot.report import write_page
        from lightning_fot.report.content.cells import rows_as_csv
        from lightning_fot.system.digests import write_sealed
        from lightning_fot.system.files import write_text

        folder = self._folder(trainer)
        results = self._results(trainer, module)
        write_text(folder / "metrics.csv", rows_as_csv([{**row, "step": int(row["step"])} for row in self._rows]))
        write_sealed(folder / "results.json", results)
        self.written = write_page(results, folder)

    def _results(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        from lightning_fot.system.environment import environment

        losses = [row[_LOSS] for row in self._rows if _LOSS in row]
        results: dict[str, Any] = {
            "schema": 1,
            "title": self.title or f"Training of {_name(module)}",
            "watched": {"class": type(module).__name__, "epoch": trainer.current_epoch},
            "seconds": self._elapsed() or None,
            "environment": environment(),
            "metrics": _summaries(self._rows, _sampled(trainer)),
            "retrieval_in_run": next((probe.rows for probe in _probes(trainer) if probe.rows), []),
        }
        if isinstance(module, FocusedTransformer):
            if losses:
                first_last = {"loss_first": losses[0], "loss_last": losses[-1]}
                results["training"] = {"steps": trainer.global_step, **first_last}
            memory = asdict(module.memory_config)
            memory["retriever"] = _spec(memory["retriever"])
            crossbatch = asdict(module.crossbatch_config) if is_dataclass(module.crossbatch_config) else {}
            results["config"] = {
                "model": {"backbone": module.backbone_name, "memory": memory, "crossbatch": crossbatch}
            }
        return results


def _name(module: L.LightningModule) -> str:
    backbone = getattr(module, "backbone_name", None)
    return Path(str(backbone)).name if backbone else type(module).__name__


def _spec(retriever: Any) -> Any:
    """What JSON can hold of a retriever's specification."""
    try:
        json.dumps(retriever)
    except TypeError:
        return retriever_label(retriever)
    return retriever


def _probes(trainer: L.Trainer) -> list[RetrievalProbe]:
    return [callback for callback in trainer.callbacks if isinstance(callback, RetrievalProbe)]  # type: ignore[attr-defined]


def _sampled(trainer: L.Trainer) -> dict[str, float]:
    """Last values of callbacks that log straight to loggers."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return {
        name: value
        for callback in callbacks
        if isinstance(callback, SampledCallback)
        for name, value in callback.values.items()
    }


def _summaries(rows: list[dict[str, float]], sampled: dict[str, float]) -> list[dict[str, Any]]:
    """A row for everything that was logged: first and last value, smallest and largest, and how often."""
    values: dict[str, list[float]] = {}
    for row in [*rows, sampled]:
        for name, value in row.items():
            if name not in ("step", "epoch"):
                values.setdefault(name, []).append(value)
    return [
        {"name": name, "first": found[0], "last": found[-1], "least": min(found), "most": max(found), "n": len(found)}
        for name, found in values.items()
    ]
