"""Every setting as a dataclass that checks itself. Standard library only. Names load when used."""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.config.backbone import LoraSettings as LoraSettings
    from lightning_fot.config.backbone import RopeSettings as RopeSettings
    from lightning_fot.config.crossbatch import CrossbatchConfig as CrossbatchConfig
    from lightning_fot.config.evaluation import EvaluationConfig as EvaluationConfig
    from lightning_fot.config.memory import MemoryConfig as MemoryConfig

_HOME = {
    "CrossbatchConfig": "crossbatch",
    "EvaluationConfig": "evaluation",
    "LoraSettings": "backbone",
    "MemoryConfig": "memory",
    "RopeSettings": "backbone",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
