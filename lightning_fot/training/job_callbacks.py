"""The training half of a job: callbacks for progress, for stopping, and for what ``results.json`` says of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_fot.config.data import IGNORED
from lightning_fot.errors import SettingError
from lightning_fot.system.files import writing
from lightning_fot.system.progress import JobProgress
from lightning_fot.system.signals import StopGuard, Stopped
from lightning_fot.training.run_folder import RunFolder

MODEL_PHASE = "model"
TRAIN_PHASE = "train"
# Token-passes of one trained token: the forward pass, and the backward pass through the upper layers.
TRAIN_COST = 2.0
# Reading and dequantising SmolLM2's weights takes as long as some thousand tokens.
MODEL_COST = 3000.0
# Between checkpoints; what a kill can cost.
SAVE_EVERY_S = 60.0


class TrainingRecord(Callback):
    """Counts steps, tokens and seconds, and keeps the losses. All of it goes into the checkpoint: resuming counts on.

    Attributes:
        totals: ``steps``, ``tokens``, ``seconds``, ``loss_first``, ``loss_last``.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Any] = {
            "steps": 0,
            "tokens": 0,
            "seconds": 0.0,
            "loss_first": None,
            "loss_last": None,
        }
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Goes into the checkpoint."""
        return dict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes from the checkpoint."""
        self.totals.update(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch."""
        # Where nothing is to be predicted, the loss of 0 says nothing.
        if bool((batch["targets"] != IGNORED).any()):
            loss = _loss(trainer, outputs)
            if self.totals["loss_first"] is None:
                self.totals["loss_first"] = loss
            self.totals["loss_last"] = loss
        self.totals["steps"] = trainer.global_step
        self.totals["tokens"] += batch["input_ids"].numel() * trainer.world_size
        self.totals["seconds"] += time.perf_counter() - self._began

    def results(self) -> dict[str, Any]:
        """The ``training`` section of ``results.json``."""
        totals = self.totals
        rate = totals["tokens"] / totals["seconds"] if totals["seconds"] else None
        return {**totals, "tokens_per_s": rate}


class TrainingProgress(Callback):
    """Shows training in the job's progress.

    Args:
        progress: Where to show it.
    """

    def __init__(self, progress: JobProgress) -> None:
        self.progress = progress

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The weights are read next."""
        if stage == "fit":
            self.progress.start(MODEL_PHASE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights have been read."""
        self.progress.finish(MODEL_PHASE)
        if trainer.max_steps > 0 and trainer.global_step:
            self.progress.message(f"Training goes on after step {trainer.global_step} of {trainer.max_steps}.")
        self.progress.start(TRAIN_PHASE)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch more."""
        loss = _loss(trainer, outputs)
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        self.progress.advance(
            TRAIN_COST * batch["input_ids"].numel(), f"step {trainer.global_step}{of}, loss {loss:.3f}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All steps are done."""
        self.progress.finish(TRAIN_PHASE)


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt``: after the first step, every minute, at the end, and when the job is stopped.

    Lightning's ModelCheckpoint can do it by steps only, and writes in place: a crash while it writes loses both states.
    One of it in ``trainer.callbacks`` works beside this one.

    Args:
        folder: The run folder.
        guard: Catches the signals; while training runs it defers them to the end of a step.
        every_s: Seconds between checkpoints; None takes ``SAVE_EVERY_S``.
    """

    def __init__(self, folder: RunFolder, guard: StopGuard, every_s: float | None = None) -> None:
        self.folder = folder
        self.guard = guard
        self.every_s = SAVE_EVERY_S if every_s is None else every_s
        self._saved_at = float("-inf")
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses checkpoints that are folders: they could not be replaced as a whole.

        Raises:
            SettingError: The strategy writes such.
        """
        if stage == "fit" and getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise SettingError(
                "trainer.strategy.init_args.save_distributed_checkpoint",
                True,
                "makes a folder a checkpoint, which a kill could leave half written",
                "Set it to false: one file, which any number of ranks can go on from.",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, with the weights read, a step is finished before the job stops."""
        self.guard.deferred = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals from Lightning, in whose handler one rank broadcasts and the others do not: they hang."""
        if trainer.world_size > 1:
            self.guard.claim()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time to, and stops if asked."""
        # All ranks save, or none does: they wait for each other, and their clocks differ.
        stop = _agreed(trainer, self.guard.pending is not None)
        due = trainer.global_step == trainer.max_steps or time.monotonic() - self._saved_at > self.every_s
        if stop or _agreed(trainer, due):
            self._save(trainer)
        if stop:
            # The loop logs a step's metrics after this hook, which it will not reach.
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**found, "epoch": float(trainer.current_epoch)}, step=trainer.global_step - 1)
                logger.save()
            self.guard.check()
            # The signal has reached another rank only.
            raise Stopped(signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end, unless the last step has just been saved; from here on signals act at once again."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self.guard.deferred = False

    def _save(self, trainer: Trainer) -> None:
        target = self.folder.last_checkpoint
        if trainer.is_global_zero:
            # First under another name: a crash while writing leaves the checkpoint before.
            try:
                with writing(target) as fresh:
                    trainer.save_checkpoint(fresh)
            except OSError as error:
                raise SettingError(
                    "run_dir", str(self.folder.path), f"cannot be written ({error})", "Make room, then go on from it."
                ) from error
        else:
            # Takes part; the first rank says where to.
            trainer.save_checkpoint(target)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


def _loss(trainer: Trainer, outputs: Any) -> float:
    """Mean loss of a batch, as the module logs it: what it returns may be weighted for ranks to learn as one."""
    if (logged := trainer.callback_metrics.get("train/loss")) is not None:
        return float(logged)
    return float(outputs["loss"] if isinstance(outputs, Mapping) else outputs) * trainer.accumulate_grad_batches


def _agreed(trainer: Trainer, wanted: bool) -> bool:
    """Whether any rank wants it."""
    return wanted if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(wanted, all=False)
