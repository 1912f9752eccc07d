"""A memory of millions of tokens for Llama-style Hugging Face models (Focused Transformer, arXiv 2307.03170).

Importing this package imports neither torch nor lightning; the names below load when first used.
"""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.backbone import attach_memory as attach_memory
    from lightning_fot.config import CrossbatchConfig as CrossbatchConfig
    from lightning_fot.config import EvaluationConfig as EvaluationConfig
    from lightning_fot.config import MemoryConfig as MemoryConfig
    from lightning_fot.data.datamodule import CrossbatchDataModule as CrossbatchDataModule
    from lightning_fot.memory import Memory as Memory
    from lightning_fot.module import FocusedTransformer as FocusedTransformer
    from lightning_fot.opening import attach_pretrained as attach_pretrained

__version__ = "0.1.0"

_HOME = {
    "attach_memory": "backbone",
    "attach_pretrained": "opening",
    "CrossbatchConfig": "config",
    "CrossbatchDataModule": "data.datamodule",
    "EvaluationConfig": "config",
    "FocusedTransformer": "module",
    "Memory": "memory",
    "MemoryConfig": "config",
}

__all__ = [*sorted(_HOME), "__version__"]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
