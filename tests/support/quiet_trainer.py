"""A Trainer that says and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


def trainer(folder: Path, **changes: Any) -> L.Trainer:
    """Three steps on the CPU; ``changes`` are those of ``Trainer``."""
    settings: dict[str, Any] = {
        "max_steps": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**settings | changes)
