"""A memory of millions of tokens for Llama-style Hugging Face models (Focused Transformer, arXiv 2307.03170).

Importing this package imports neither torch nor lightning; the names below load when first used.
"""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.config.crossbatch import CrossbatchConfig as CrossbatchConfig
    from lightning_fot.config.evaluation import EvaluationConfig as EvaluationConfig
    from lightning_fot.config.memory import MemoryConfig as MemoryConfig
    from lightning_fot.data.datamodule import CrossbatchDataModule as CrossbatchDataModule
    from lightning_fot.memory.memory import Memory as Memory
    from lightning_fot.model.attach import attach_memory as attach_memory
    from lightning_fot.model.attach import attach_pretrained as attach_pretrained
    from lightning_fot.model.hub import push_to_hub as push_to_hub
    from lightning_fot.training.module import FocusedTransformer as FocusedTransformer

__version__ = "0.2.0"

_HOME = {
    "attach_memory": "model.attach",
    "attach_pretrained": "model.attach",
    "CrossbatchConfig": "config.crossbatch",
    "CrossbatchDataModule": "data.datamodule",
    "EvaluationConfig": "config.evaluation",
    "FocusedTransformer": "training.module",
    "Memory": "memory.memory",
    "MemoryConfig": "config.memory",
    "push_to_hub": "model.hub",
}

__all__ = [*sorted(_HOME), "__version__"]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
