"""Base of callbacks that measure a batch now and then, within a share of the time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_fot.callbacks.budget import Budget
from lightning_fot.config.crossbatch import CrossbatchConfig
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.layers import evaluation_mode
from lightning_fot.training.module import FocusedTransformer


class SampledCallback(L.Callback, ABC):
    """Measures a training batch every ``every_n_steps`` steps, and the first batch of each validation and test.

    Model, modes and random states are left as they were. Each rank measures its own batch; what is logged is rank 0's:
    ``train/memory/...`` straight to the loggers, ``memory/...`` as Lightning logs validation. Within ``fit`` at most
    ``max_share`` of the time goes into measuring; what is not paid for yet is left out.

    Args:
        every_n_steps: Optimiser steps between measurements in training; 0 leaves training alone.
        max_share: Of the time of ``fit``; None measures every time.

    Attributes:
        values: What was measured last, by the name under which it is logged.

    Raises:
        SettingError: A value is out of its range.
    """

    def __init__(self, every_n_steps: int = 100, max_share: float | None = 0.02) -> None:
        self._check("every_n_steps", every_n_steps, 0)
        if max_share is not None and (isinstance(max_share, bool) or not 0 < max_share <= 1):
            raise self._wrong("max_share", max_share, "must be above 0 and at most 1, or None")
        self.every_n_steps = every_n_steps
        self.budget = Budget(max_share)
        self.values: dict[str, float] = {}
        self._step = -1

    @abstractmethod
    def measure(self, module: FocusedTransformer, batch: dict[str, Tensor]) -> dict[str, float]:
        """What is logged of a batch; nothing where the batch has none of it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses other modules."""
        if not isinstance(pl_module, FocusedTransformer):
            raise SettingError(
                "trainer.callbacks", type(self).__name__, f"cannot measure a {type(pl_module).__name__}",
                "Use it with a FocusedTransformer.",
            )  # fmt: skip

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.budget.start()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures if it is time to."""
        step = trainer.global_step
        due = step != self._step and self.every_n_steps > 0 and step % self.every_n_steps == 0
        self._step = step
        if due and self.budget.allows(trainer):
            self.values = self._measure(trainer, pl_module, batch)
            for logger in trainer.loggers:
                # As Lightning numbers what a training step logs.
                logger.log_metrics({f"train/{name}": value for name, value in self.values.items()}, step=step - 1)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures the first batch."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or not self.budget.allows(trainer):
            return
        self.values = self._measure(trainer, pl_module, batch)
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "rank_zero_only": True, "batch_size": 1}
        pl_module.log_dict(self.values, add_dataloader_idx=False, **how)

    on_test_batch_end = on_validation_batch_end

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        assert isinstance(module, FocusedTransformer)
        if not module.lm.memory_layers:
            return {}
        with (
            self.budget.measuring(),
            isolate_rng(),
            evaluation_mode(module.lm.model),
            trainer.precision_plugin.forward_context(),
        ):
            return self.measure(module, batch)

    def _check(self, name: str, value: object, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, value, f"must be a whole number of at least {least}")

    def _wrong(self, name: str, value: object, problem: str) -> SettingError:
        return SettingError(f"{type(self).__name__}.{name}", value, problem, "Correct it.")


def streams(batch: dict[str, Tensor], config: CrossbatchConfig) -> tuple[Tensor, Tensor] | None:
    """Text of each stream of a batch, and the window that follows it; None where a batch holds no window before.

    Args:
        batch: As the data module gives it: ``input_ids`` (B, T), and for the ``paper`` layout ``previous_ids``
            (B, w, T) with ``previous_valid`` (B, w).
        config: Its layout.

    Returns:
        (n, c) and (n, T) int64.
    """
    ids = batch["input_ids"]
    if "previous_ids" in batch:
        valid = batch.get("previous_valid")
        whole = torch.ones(len(ids), dtype=torch.bool) if valid is None else valid.bool().all(1).cpu()
        earlier = batch["previous_ids"].flatten(1)[whole]
        return (earlier, ids[whole]) if len(earlier) else None
    count = config.rows_of_a_text
    if count < 2 or len(ids) % count:
        return None
    rows = ids.reshape(-1, count, ids.shape[1])
    return rows[:, :-1].flatten(1), rows[:, -1]
