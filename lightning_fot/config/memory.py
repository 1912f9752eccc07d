"""Settings of memory attention: which layers have a memory, and how they read it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from lightning_fot.config.attending import registry, renamed
from lightning_fot.config.attending.base import Attending
from lightning_fot.errors import SettingError, check_at_least, check_factor, close_match

SHARDS = "model.memory.shards"


@dataclass(frozen=True)
class ProcessSettings:
    """Processes of a Ray cluster (a setting that is a number, or a mapping).

    Args:
        count: Processes.
        address: Of a Ray cluster, such as ``10.0.0.1:6379``, or ``auto`` for the one of this machine; None joins the
            cluster that this process is part of, and starts one on this machine where there is none.
        cpus: Cores that a process reserves; it computes with so many threads, and at least one.
        memory_mib: MiB of memory that a process reserves; None reserves none.

    Raises:
        SettingError: A value is out of its range.
    """

    section: ClassVar[str]

    count: int
    address: str | None = None
    cpus: float = 1.0
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self.section, self, 1, "count", "memory_mib")
        if self.count is None:
            raise SettingError(f"{self.section}.count", None, "must be a whole number of at least 1", "Correct it.")
        self._check_amount("cpus")
        self._check_word("address")

    def _check_amount(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 4096:
            raise SettingError(f"{self.section}.{name}", value, "must be a number from 0", "1 is usual.")

    def _check_word(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise SettingError(f"{self.section}.{name}", value, "is no text", "Leave it out, or give a word.")

    @classmethod
    def read(cls, given: int | Mapping[str, Any] | None) -> Self | None:
        """As it stands in the configuration; None where nothing is shared out.

        Raises:
            SettingError: It is neither a number nor a mapping of these settings.
        """
        if given is None:
            return None
        if not isinstance(given, Mapping):
            return cls(given)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise SettingError(
                    f"{cls.section}.{name}", given[name], "is not known",
                    f"{close_match(str(name), known)}There are: {', '.join(known)}.",
                )  # fmt: skip
        if "count" not in given:
            raise SettingError(cls.section, dict(given), "does not say how many", "Add count: 2, for example.")
        return cls(**given)


@dataclass(frozen=True)
class ShardSettings(ProcessSettings):
    """Processes that share out the pairs of a memory (``model.memory.shards``): each holds a slice of all layers.

    Args:
        count: As :class:`ProcessSettings`.
        address: As there.
        cpus: As there.
        memory_mib: MiB of memory that a shard reserves, and may fill with pairs; None sets no limit.
        name: Under which the shards are listed in the cluster; two jobs cannot have one name. None leaves it to Ray.

    Raises:
        SettingError: A value is out of its range.

    Example:
        >>> ShardSettings.read({"count": 4, "memory_mib": 2048}).count
        4
    """

    section: ClassVar[str] = SHARDS

    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_word("name")


@dataclass
class MemoryConfig:
    """Which layers get a memory, and how they read it (the arguments of ``attach_memory``).

    Args:
        memory_layers: Layers that also attend to the memory; negative numbers count from the end. ``all``: every layer
            whose attention sees the whole text in the plain model.
        window: Local context in tokens. Longer input is cut into windows of this size.
        top_k: Pairs retrieved for each query and KV head.
        positions: ``first``: local rotary, memory keys as if at position 0 (LongLLaMA); ``none``: no rotary in
            memory layers (the paper's small models); ``constant``: local rotary, and all memory keys at ``distance``
            places before each query (for models that were not trained to use a memory).
        retriever: Name, ``{"name": ..., **arguments}`` or a factory; or one for each memory layer,
            ``{"layers": {18: ..., 20: ...}}``, layers counted from 0.
        overlap: Local tokens that a window shares with the one before. A pretrained model needs ``sink_tokens`` with
            it: a window that begins in mid-text lacks the first token that its heads rest on.
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
        distance: With ``positions=constant``, places between a query and all keys of the memory; None is ``window``.
        dense_pairs: A memory of at most so many pairs a head is attended to as a whole, without a search: as with
            ``top_k`` above its length.
        attending: Another way of attending, for comparison: a name, or ``{"name": ..., **arguments}``; each has a file
            in ``config/attending``. None is FoT's own: one softmax over local and retrieved pairs.
        shards: Processes that share out the pairs, here or on other machines (needs the extra ``ray``): a number, or
            ``{"count": ..., "address": ..., "cpus": ..., "memory_mib": ..., "name": ...}``; None keeps all in this one.

    Raises:
        SettingError: A value is out of its range.
    """

    memory_layers: list[int] | Literal["all"] = field(default_factory=lambda: [-1])
    window: int = 512
    top_k: int = 32
    positions: Literal["first", "none", "constant"] = "first"
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
    distance: int | None = None
    dense_pairs: int = 0
    shards: int | dict[str, Any] | None = None

    def __post_init__(self, *old: Any) -> None:
        prefix = "model.memory"
        given = dict(zip(renamed.OLD_KEYS, old, strict=True))
        self.attending = renamed.in_new_words(self.attending, given)
        check_at_least(prefix, self, 1, "window", "top_k", "capacity", "last_context_length", "distance")
        check_at_least(prefix, self, 0, "overlap", "sink_tokens", "skip_window_start", "dense_pairs")
        for name, choices in (
            ("positions", ("first", "none", "constant")),
            ("dtype", (None, "float32", "bfloat16", "int8")),
            ("offload", ("values", "all")),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(str(choice) for choice in choices)
                raise SettingError(f"{prefix}.{name}", getattr(self, name), "is not known", f"Choose one of {allowed}.")
        check_factor(f"{prefix}.score_factor", self.score_factor)
        self._check_layers()
        if self.distance is not None and self.positions != "constant":
            raise SettingError(
                f"{prefix}.distance",
                self.distance,
                f"is not used with positions={self.positions}",
                "Set positions=constant, or leave it out.",
            )
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
        if self.sharding is not None and self.offload_dir is not None:
            raise SettingError(
                f"{prefix}.offload_dir",
                self.offload_dir,
                "is of this process, and shards keep the pairs in theirs",
                "Set shards or offload_dir.",
            )
        self.way.check(self)
        note = renamed.told(given, self.attending)
        if note is not None:
            warnings.warn(note, DeprecationWarning, stacklevel=3)

    @classmethod
    def training_free(cls, **changes: Any) -> Self:
        """Settings for a model that was not trained to use a memory (``configs/training_free.yaml``).

        Args:
            **changes: Fields in place of the recipe's.
        """
        return cls(**{**TRAINING_FREE, **changes})

    def _check_layers(self) -> None:
        if isinstance(self.memory_layers, str) and self.memory_layers != "all":
            raise SettingError(
                "model.memory.memory_layers", self.memory_layers, "names no layers", "Give a list of numbers, or all."
            )

    @property
    def far_place(self) -> int | None:
        """Places between a query and all keys of the memory; None where that follows the query's own place."""
        if self.positions != "constant" or not self.memory_layers:
            return None
        return self.window if self.distance is None else self.distance

    @property
    def sharding(self) -> ShardSettings | None:
        """The settings of ``shards``; None where the pairs lie in this process."""
        return ShardSettings.read(self.shards)

    @property
    def way(self) -> Attending:
        """The settings of ``attending``."""
        return registry.read(self.attending)

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Memory layers as sorted non-negative numbers.

        Args:
            num_layers: Layers of the backbone; ``all`` are these, without those that an attached model cannot serve.

        Raises:
            SettingError: A layer is out of range, named twice, or has no retriever where each has its own.
        """
        from lightning_fot.config.retriever import layer_spec

        if self.memory_layers == "all":
            # Which of them have attention, and so need a retriever, the model knows.
            return tuple(range(num_layers))
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


# What loses least of an untrained model's own attention: docs/LOG.md, "No training".
TRAINING_FREE: dict[str, Any] = {
    "memory_layers": "all",
    "window": 512,
    "top_k": 128,
    "positions": "constant",
    "overlap": 128,
    "sink_tokens": 4,
    "dense_pairs": 16384,  # below it no index is built either
}

# Settings that earlier versions do not know, and the values that say what those did.
_LATER: dict[str, Any] = {"distance": None, "dense_pairs": 0, "shards": None}


def without_later(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a memory without those that say what earlier versions did: these then read and digest them alike.

    Example:
        >>> without_later({"window": 16, "distance": None, "dense_pairs": 8})
        {'window': 16, 'dense_pairs': 8}
    """
    return {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}


# Where a memory lies on one machine: not the model's.
OF_THE_MACHINE = ("offload", "offload_dir", "shards")
