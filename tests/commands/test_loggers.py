"""Lightning's own loggers beside the job's, as a configuration names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_fot.cli import main

LOGGERS = {
    "tensorboard": ("TensorBoardLogger", {"save_dir": "kept"}, "kept/lightning_logs/version_0/events.out.tfevents.*"),
    "wandb": ("WandbLogger", {"save_dir": "kept", "offline": True}, "kept/wandb/offline-run-*/run-*.wandb"),
    "mlflow": ("MLFlowLogger", {"tracking_uri": "file:./kept"}, "kept/*/*/metrics/train/loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LOGGERS)
def test_a_logger_gets_what_the_job_logs(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    # MLflow calls its files outdated, and asks for a word before it writes them.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    Path("kept").mkdir()
    name, arguments, files = LOGGERS[library]
    chosen = [{"class_path": f"lightning.pytorch.loggers.{name}", "init_args": arguments}]
    Path("logger.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 2, "logger": chosen}}), encoding="utf-8")
    assert main(["fit", "--config=smoke", "--config=logger.yaml", "--run_dir=run"]) == 0
    (found,) = tmp_path.glob(files)
    assert found.stat().st_size > 0
    assert "train/loss" in Path("run/metrics.csv").read_text(encoding="utf-8")
