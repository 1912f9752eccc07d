"""What a way of attending can change: the pass of a window, how texts are read, how training computes logits.

Readers, training, the self-test and :class:`MemoryLM` ask the attached model's way and know none by name. A way is one
file in ``model/passes/ways``, a subclass of :class:`WayOfAttending` that :func:`register` makes known; its settings
(``config/attending/base.py``) say what it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_fot.config.attending import registry
from lightning_fot.config.attending.base import SETTING, Attending
from lightning_fot.errors import SettingError
from lightning_fot.model.passes.base import Pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_fot.config.crossbatch import CrossbatchConfig
    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.model.passes.probe import LayerFacts


class Attached(Protocol):
    """What a way needs of an attached model."""

    model: PreTrainedModel
    config: MemoryConfig
    memory_layers: tuple[int, ...]

    @property
    def facts(self) -> Mapping[int, LayerFacts]:
        """Shapes of each layer."""

    @property
    def device(self) -> torch.device:
        """Of the backbone."""

    def during(self, current: Pass) -> AbstractContextManager[None]:
        """Memory layers serve ``current`` inside the block."""


class WayOfAttending:
    """How a model attends; this class itself is FoT's own way, which the readers and the crossbatch serve.

    Args:
        settings: Of ``settings_type``.
    """

    settings_type: ClassVar[type[Attending]] = Attending
    fixed_frequencies: ClassVar[bool] = False
    """Whether rotary frequencies must not follow the length of what is read."""
    trains_texts: ClassVar[bool] = False
    """Whether training goes by :meth:`batch_logits`, and not by the crossbatch."""

    def __init__(self, settings: Attending) -> None:
        self.settings = settings

    def gates(self, attached: Attached) -> nn.ParameterDict:
        """Learned (H,) logits of the memory's share, by memory layer: what passes are given as ``LayerCall.gate``."""
        return nn.ParameterDict()

    def plain_passes(self, tokens: int, device: torch.device) -> list[Pass]:
        """Passes of this way under which ``tokens`` tokens must get the plain backbone's logits, for the self-test."""
        return []

    def window_pass(self, length: int, device: torch.device) -> Pass | None:
        """What serves a window of ``length`` tokens that is read or trained alone; None leaves it to the caller.

        In the reading ``full_context`` the window is the whole text, and the pass serves its chunks beside a KV cache.
        A way that has such a pass needs a model without memory layers, overlap and sinks.
        """
        return None

    def read_texts(
        self, attached: Attached, input_ids: Tensor, keep: int, ends_full: bool = False
    ) -> Iterator[tuple[int, Tensor | None]] | None:
        """Reads whole texts; None leaves it to the readers of windows.

        Args:
            attached: The model.
            input_ids: (N, T) int64; what stands at the end of a shorter text changes nothing before it.
            keep: Tokens at the end whose logits are wanted.
            ends_full: Let the first window be the shorter one, where windows do not divide the text, and not the last.

        Yields:
            Tokens of each text read, and logits (N, n, vocabulary) of the next tokens of the end, or None.
        """
        return None

    def batch_logits(self, attached: Attached, input_ids: Tensor, crossbatch: CrossbatchConfig) -> Tensor:
        """Logits of a training batch, with gradients; asked of ways that train whole texts.

        Args:
            attached: The model.
            input_ids: (B, T) int64; ``crossbatch.rows_of_a_text`` rows that follow each other are one text.
            crossbatch: Settings of the training.

        Returns:
            (B, T, vocabulary).

        Raises:
            SettingError: The batch does not fit the settings.
        """
        raise NotImplementedError(f"{type(self).__name__} says trains_texts, and has no batch_logits")


_WAYS: dict[str, type[WayOfAttending]] = {}
WayT = TypeVar("WayT", bound=type[WayOfAttending])


def register(way: WayT) -> WayT:
    """Makes a way known by the name of its settings; a decorator.

    Raises:
        ValueError: Another way has that name.
    """
    registry.register(way.settings_type)
    _WAYS[way.settings_type.name] = way
    return way


def find(name: str) -> type[WayOfAttending]:
    """The way of a name."""
    if name not in _WAYS:
        import_module(f"{__package__}.ways.{name}")
    return _WAYS[name]


def way_of(config: MemoryConfig) -> WayOfAttending:
    """The way of a model's settings.

    Raises:
        SettingError: They cannot work: those of a way that has its settings in its own file are told only here.
    """
    spec = registry.normal(config.attending)
    way = WayOfAttending if spec is None else find(spec["name"])
    settings = registry.read(spec)
    settings.check(config)
    found = way(settings)
    alone = found.window_pass(1, torch.device("cpu")) is not None
    if alone and (config.memory_layers or config.overlap or config.sink_tokens):
        raise SettingError(
            SETTING,
            settings.name,
            f"is for windows that are read alone; here memory_layers={config.memory_layers}, "
            f"overlap={config.overlap}, sink_tokens={config.sink_tokens}",
            "Set memory_layers=[], overlap=0 and sink_tokens=0.",
        )
    return found


def reading_way(attached_way: WayOfAttending, reading: str) -> WayOfAttending:
    """The way that reads a text as ``evaluation.readings`` names it: the model's own, or another without arguments.

    Raises:
        SettingError: Another one has arguments, which are not known.
    """
    if attached_way.settings.name == reading:
        return attached_way
    way = find(reading)
    return way(registry.read(reading))
