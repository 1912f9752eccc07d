"""When a learning-rate scheduler is advanced: after each optimiser step, or after each validation that it waits for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning import LightningModule


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """What Lightning is told of a scheduler.

    Args:
        scheduler: Of torch, or Lightning's ``ReduceLROnPlateau``, which says what it monitors.

    Raises:
        SettingError: It waits for a metric and does not say which.
    """
    how: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if not isinstance(scheduler, ReduceLROnPlateau):
        return how
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise SettingError(
            "model.lr_scheduler",
            type(scheduler).__name__,
            "does not say which metric it waits for",
            "Use lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/loss.",
        )
    if _logged_in_training(monitor):
        return {**how, "monitor": monitor}
    # Lightning knows steps and epochs, and most trainings have one epoch: `advance_waiting` advances it.
    return {**how, "monitor": monitor, "frequency": sys.maxsize}


def advance_waiting(module: LightningModule) -> None:
    """Advances the schedulers that wait for a metric of validation; call it at the end of one.

    Raises:
        SettingError: The validation has logged no such metric.
    """
    trainer = module.trainer
    if trainer.sanity_checking or trainer.state.fn != "fit":
        return
    for config in trainer.lr_scheduler_configs:
        if not config.reduce_on_plateau or _logged_in_training(config.monitor):
            continue
        # What callbacks log may be the first rank's alone; all are to decide alike.
        value = trainer.strategy.broadcast(trainer.callback_metrics.get(str(config.monitor)))
        if value is None:
            raise SettingError(
                "model.lr_scheduler",
                config.monitor,
                "is a metric that validation does not log",
                f"Choose one of {', '.join(sorted(trainer.callback_metrics))}.",
            )
        module.lr_scheduler_step(config.scheduler, value)


def _logged_in_training(monitor: Any) -> bool:
    return str(monitor).startswith("train/")
