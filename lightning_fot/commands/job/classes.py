"""What a configuration may have made: subclasses of what a trainer is made of, and nothing that is merely callable.

A configuration may come from somebody else, and jsonargparse makes whatever a ``class_path`` names: where a place takes
any value even a function is called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fot.errors import SettingError

_OWN: dict[str, tuple[type, ...]] = {
    "model.optimizer": (Optimizer,),
    "model.lr_scheduler": (LRScheduler, ReduceLROnPlateau),
    "trainer.callbacks": (Callback,),
    "trainer.logger": (Logger,),
    "trainer.profiler": (Profiler,),
    "trainer.strategy": (Strategy,),
    "trainer.accelerator": (Accelerator,),
    "trainer.plugins": (Precision, ClusterEnvironment, CheckpointIO, LayerSync),
}
_ANY = tuple(base for bases in _OWN.values() for base in bases)
# Strategies take small objects of torch's, such as a policy of sharding.
_LIBRARY = "torch.distributed."
_OURS = "lightning_fot.config."
_SECTIONS = ("trainer", "model", "data", "evaluation")


def check_classes(config: Mapping[str, Any] | Namespace) -> None:
    """Refuses a configuration that would have anything else made or called.

    Args:
        config: Parsed, nothing of it made yet.

    Raises:
        SettingError: It would; the setting is named.
    """
    sections = vars(config) if isinstance(config, Namespace) else config
    for key, value in _named({name: sections.get(name) for name in _SECTIONS}, ""):
        place = next((name for name in _OWN if key == name or key.startswith((f"{name}.", f"{name}["))), None)
        if place is None:
            # Not even imported: that would run its module.
            if not isinstance(value, str) or not value.startswith(_OURS):
                raise SettingError(key, _shown(value), "is a class where none is made", "Give a plain value.")
            continue
        # What stands right there must be of that kind; what its arguments name, of any.
        inside = ".init_args" in key
        bases = _ANY if inside else _OWN[place]
        found = _found(value) if isinstance(value, str) else value
        right = isinstance(found, type) and (
            issubclass(found, bases) or (inside and found.__module__.startswith(_LIBRARY))
        )
        if not right:
            kinds = ", ".join(base.__name__ for base in bases)
            raise SettingError(
                key, _shown(value), f"is no subclass of {kinds}", "Nothing else is made from a configuration."
            )


def _found(path: str) -> object:
    """The object of a path, whose module jsonargparse has imported; None where there is none."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _shown(value: object) -> object:
    return value if isinstance(value, str) else getattr(value, "__qualname__", repr(value))


def _named(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Settings that name a class, with its path, and settings whose value is callable."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield key, value["class_path"]
        for name, item in value.items():
            yield from _named(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _named(item, f"{key}[{number}]")
    elif callable(value):
        yield key, value
