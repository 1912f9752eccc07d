"""The LightningModule, its loss, its parameters, its run folder and checkpoints.

Names load when used.
"""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.training.module import FocusedTransformer as FocusedTransformer
    from lightning_fot.training.parameters import load_adapter as load_adapter
    from lightning_fot.training.parameters import save_adapter as save_adapter

_HOME = {
    "FocusedTransformer": "module",
    "load_adapter": "parameters",
    "save_adapter": "parameters",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
