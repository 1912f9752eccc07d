"""Settings of memory attention: which layers have a memory, and how they read it."""

import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from lightning_fot.config.attending import registry, renamed
from lightning_fot.config.attending.base import Attending
from lightning_fot.errors import SettingError, check_at_least, check_factor


@dataclass
class MemoryConfig:
    """Which layers get a memory, and how they read it (the arguments of ``attach_memory``).

    Args:
        memory_layers: Layers that also attend to the memory; negative numbers count from the end.
        window: Local context in tokens. Longer input is cut into windows of this size.
        top_k: Pairs retrieved for each query and KV head.
        positions: ``first``: local rotary, memory keys as if at position 0 (LongLLaMA); ``none``: no rotary in
            memory layers (the paper's small models).
        retriever: Name, ``{"name": ..., **arguments}`` or a factory; or one for each memory layer,
            ``{"layers": {18: ..., 20: ...}}``, layers counted from 0.
        overlap: Local tokens that a window shares with the one before.
        sink_tokens: First tokens of the text that stay in the local context of every layer.
        skip_window_start: Keys at a window's start that are not stored: attention sinks poison a memory.
        score_factor: Factor on all scores of memory layers, beside the backbone's own (1/√D). In a larger memory more
            pairs come close to the best one, and together they outweigh it: above 1 attention is sharper.
        integration: Not kept: an older word for what ``attending`` says.
        dtype: Stored dtype of keys and values: ``float32``, ``bfloat16`` or ``int8`` (a byte a coordinate and a scale a
            vector); None takes the model's.
        capacity: Tokens kept a row, oldest out; None keeps all.
        offload_dir: Folder for memory that the operating system pages in and out of a file, so that it may be larger
            than RAM; None keeps all in RAM. The file is gone with the process; ``Memory.save`` is what lasts.
        offload: What goes there: ``values`` (keys are searched, so they stay in RAM) or ``all``.
        last_context_length: Tokens at the end of a prompt that stay local (LongLLaMA); None means ``window``.
        max_distance: As ``integration``.
        segments: As ``integration``.
        dilations: As ``integration``.
        attending: Another way of attending, for comparison: a name, or ``{"name": ..., **arguments}``; each has a file
            in ``config/attending``. None is FoT's own: one softmax over local and retrieved pairs.

    Raises:
        SettingError: A value is out of its range.
    """

    memory_layers: list[int] = field(default_factory=lambda: [-1])
    window: int = 512
    top_k: int = 32
    positions: Literal["first", "none"] = "first"
    retriever: str | dict[str, Any] | Callable[..., Any] = "exact"
    overlap: int = 0
    sink_tokens: int = 0
    skip_window_start: int = 0
    score_factor: float = 1.0
    integration: InitVar[str | None] = None
    dtype: Literal["float32", "bfloat16", "int8"] | None = None
    capacity: int | None = None
    offload_dir: str | None = None
    offload: Literal["values", "all"] = "values"
    last_context_length: int | None = None
    max_distance: InitVar[int | None] = None
    segments: InitVar[list[int] | None] = None
    dilations: InitVar[list[int] | None] = None
    attending: str | dict[str, Any] | None = None

    def __post_init__(self, *old: Any) -> None:
        prefix = "model.memory"
        given = dict(zip(renamed.OLD_KEYS, old, strict=True))
        self.attending = renamed.in_new_words(self.attending, given)
        check_at_least(prefix, self, 1, "window", "top_k", "capacity", "last_context_length")
        check_at_least(prefix, self, 0, "overlap", "sink_tokens", "skip_window_start")
        for name, choices in (
            ("positions", ("first", "none")),
            ("dtype", (None, "float32", "bfloat16", "int8")),
            ("offload", ("values", "all")),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(str(choice) for choice in choices)
                raise SettingError(f"{prefix}.{name}", getattr(self, name), "is not known", f"Choose one of {allowed}.")
        check_factor(f"{prefix}.score_factor", self.score_factor)
        if self.overlap + self.sink_tokens >= self.window:
            raise SettingError(
                f"{prefix}.overlap",
                self.overlap,
                f"with sink_tokens={self.sink_tokens} leaves no room for new tokens in window={self.window}",
                "Keep overlap + sink_tokens below window.",
            )
        if self.skip_window_start >= self.window:
            raise SettingError(
                f"{prefix}.skip_window_start",
                self.skip_window_start,
                f"would store nothing of a window of {self.window}",
                "A few tokens (1 to 4) are enough.",
            )
        if self.last_context_length is not None and self.last_context_length > self.window:
            raise SettingError(
                f"{prefix}.last_context_length",
                self.last_context_length,
                f"is more than window={self.window}",
                "It says how much of the window a prompt may fill.",
            )
        self.way.check(self)
        note = renamed.told(given, self.attending)
        if note is not None:
            warnings.warn(note, DeprecationWarning, stacklevel=3)

    @property
    def way(self) -> Attending:
        """The settings of ``attending``."""
        return registry.read(self.attending)

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Memory layers as sorted non-negative numbers.

        Args:
            num_layers: Layers of the backbone.

        Raises:
            SettingError: A layer is out of range, named twice, or has no retriever where each has its own.
        """
        from lightning_fot.config.retriever import layer_spec

        resolved = []
        for layer in self.memory_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -num_layers <= layer < num_layers:
                raise SettingError(
                    "model.memory.memory_layers",
                    self.memory_layers,
                    f"layer {layer} is not in a backbone of {num_layers} layers",
                    f"Use numbers from {-num_layers} to {num_layers - 1}.",
                )
            resolved.append(layer % num_layers)
        if len(set(resolved)) != len(resolved):
            raise SettingError(
                "model.memory.memory_layers", self.memory_layers, "names a layer twice", "Name each layer once."
            )
        for layer in sorted(resolved):
            layer_spec(self.retriever, layer)
        return tuple(sorted(resolved))


# Where a memory lies on one machine: not the model's.
OF_THE_MACHINE = ("offload", "offload_dir")
