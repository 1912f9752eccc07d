"""Settings of memory attention: which layers have a memory, and how they read it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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
        integration: ``softmax``: one softmax over local and retrieved pairs (FoT); ``gate``: a learned mix per head
            (Memorizing Transformers).
        dtype: Stored dtype of keys and values: ``float32``, ``bfloat16`` or ``int8`` (a byte a coordinate and a scale a
            vector); None takes the model's.
        capacity: Tokens kept a row, oldest out; None keeps all.
        offload_dir: Folder for memory that the operating system pages in and out of a file, so that it may be larger
            than RAM; None keeps all in RAM. The file is gone with the process; ``Memory.save`` is what lasts.
        offload: What goes there: ``values`` (keys are searched, so they stay in RAM) or ``all``.
        last_context_length: Tokens at the end of a prompt that stay local (LongLLaMA); None means ``window``.
        max_distance: Local distances from this one on count as it, in every layer (rectified positions, ReRoPE): a
            window may then be longer than the backbone was trained on. For models without memory layers.
        segments: Memory layers have dilated attention over the whole text (LongNet) in place of a memory, in segments
            of these lengths; empty leaves it out.
        dilations: For each of ``segments``, every how many-th token of a segment a head sees; one of them is 1.

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
    integration: Literal["softmax", "gate"] = "softmax"
    dtype: Literal["float32", "bfloat16", "int8"] | None = None
    capacity: int | None = None
    offload_dir: str | None = None
    offload: Literal["values", "all"] = "values"
    last_context_length: int | None = None
    max_distance: int | None = None
    segments: list[int] = field(default_factory=list)
    dilations: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefix = "model.memory"
        check_at_least(prefix, self, 1, "window", "top_k", "capacity", "last_context_length", "max_distance")
        check_at_least(prefix, self, 0, "overlap", "sink_tokens", "skip_window_start")
        for name, choices in (
            ("positions", ("first", "none")),
            ("integration", ("softmax", "gate")),
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
        if self.max_distance is not None and (self.memory_layers or self.overlap or self.sink_tokens):
            raise SettingError(
                f"{prefix}.max_distance",
                self.max_distance,
                "is for windows that are read alone: pairs of a memory, an overlap or sinks have no distance to clamp",
                "Set memory_layers=[], overlap=0 and sink_tokens=0, or leave it out.",
            )
        if self.segments or self.dilations:
            check_dilated(self)

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


def check_dilated(memory: MemoryConfig) -> None:
    """Refuses patterns of dilated attention that are none, and what cannot be had beside them.

    Raises:
        SettingError: Something cannot work.
    """
    name, patterns = "model.memory.segments", (memory.segments, memory.dilations)
    for key, values in zip(("segments", "dilations"), patterns, strict=True):
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
            raise SettingError(f"model.memory.{key}", values, "must hold whole numbers of at least 1", "Correct it.")
    if len(memory.segments) != len(memory.dilations):
        raise SettingError(name, memory.segments, f"has not one each of dilations={memory.dilations}", "Correct it.")
    if any(step > size for size, step in zip(*patterns, strict=True)):
        raise SettingError(
            "model.memory.dilations",
            memory.dilations,
            f"leave segments of {memory.segments} without a token for some heads",
            "Keep each at most its segment's length.",
        )
    if 1 not in memory.dilations:
        raise SettingError(
            "model.memory.dilations",
            memory.dilations,
            "would leave tokens without any pattern",
            "Give the shortest segment a dilation of 1.",
        )
    if not memory.memory_layers:
        raise SettingError(name, memory.segments, "are for memory layers, and there are none", "Name memory_layers.")
    for key, given, needed in (
        ("overlap", memory.overlap, 0),
        ("sink_tokens", memory.sink_tokens, 0),
        ("integration", memory.integration, "softmax"),
    ):
        if given != needed:
            raise SettingError(
                f"model.memory.{key}",
                given,
                f"cannot be had beside dilated attention (segments={memory.segments})",
                f"Set it to {needed}.",
            )


# Where a memory lies on one machine: not the model's.
OF_THE_MACHINE = ("offload", "offload_dir")
