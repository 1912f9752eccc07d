"""A whole configuration of ``run``, ``fit``, ``validate`` or ``test``. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

from lightning_fot.config.data import DataConfig
from lightning_fot.config.evaluation import EvaluationConfig
from lightning_fot.config.model import ModelConfig

# The settings that a link fills from the model's: the user never sets them.
LINKS = {
    "model.backbone": "data.tokenizer",
    "model.memory.window": "data.window",
    "model.crossbatch.layout": "data.layout",
    "model.crossbatch.pack": "data.pack",
    "model.crossbatch.w": "data.prev_windows",
}
# Arguments of Lightning's Trainer, and the version that has them.
LIGHTNING = (2, 6)
TRAINER = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run",
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time",
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "profiler", "detect_anomaly",
    "barebones", "plugins", "sync_batchnorm", "reload_dataloaders_every_n_epochs", "default_root_dir",
    "enable_autolog_hparams", "model_registry",
)  # fmt: skip


@dataclass
class RunConfig:
    """A whole configuration; settings that are right by themselves are checked beside each other.

    Args:
        seed_everything: Seed of all generators; True draws one.
        trainer: Arguments of Lightning's Trainer, which checks them itself.
        model: What is trained.
        data: What it is trained on.
        evaluation: What is measured after training.
        run_dir: Run folder; None takes runs/ and the configuration's name.
        ckpt_path: Checkpoint to go on from; ``last`` is the run folder's.

    Raises:
        SettingError: The model cannot do what is to be measured.
    """

    seed_everything: bool | int = 0
    trainer: dict[str, Any] | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run_dir: str | None = None
    ckpt_path: str | None = None

    def __post_init__(self) -> None:
        self.evaluation.check_readings(self.model.memory)
        for task in self.evaluation.tasks:
            task.check(self.model.memory.window)
