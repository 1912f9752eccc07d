"""Settings of memory attention, crossbatch training and evaluation: plain dataclasses that import nothing heavy.

Each checks itself when made, so a wrong value fails before a model or a document is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_fot.backbone_settings import LoraSettings, RopeSettings
from lightning_fot.combinations import check_dilated
from lightning_fot.errors import SettingError, check_at_least, check_factor
from lightning_fot.evaluation.tasks import settings as task_settings
from lightning_fot.schedules import ScheduleConfig, schedule_from

__all__ = ["CrossbatchConfig", "EvaluationConfig", "LoraSettings", "MemoryConfig", "RopeSettings"]


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
        from lightning_fot.retrievers.registry import layer_spec

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


@dataclass
class CrossbatchConfig:
    """Who sees whom in training (fot-semantics: FoT paper section 3.2 and LongLLaMA's released recipe).

    Args:
        layout: ``packed``: one pass, row i sees rows before it (LongLLaMA); ``paper``: previous windows are embedded
            in a separate call and row i sees those of rows i ... i+d-1; ``previous_window``: a pack is one text, in
            which every layer sees ``model.memory.overlap`` tokens of the window before (Transformer-XL).
        range: ``packed``: the most rows that a row sees.
        pack: Consecutive rows that are consecutive windows of one stream; not in ``paper``.
        stepping: ``packed``: rows early in a pack see fewer rows (the 3B recipe: (0,0), (1,1), (2,1), (3,0) positives
            and negatives).
        d: ``paper``: contexts a row sees, one of them its own.
        w: ``paper``: previous windows of each row.
        differentiable: Let gradients reach the shown keys and values (FoT); False detaches them (Memorizing
            Transformers, Transformer-XL).
        schedule: How ``range`` or ``d`` changes in training; None keeps it.
        across_ranks: In distributed training, whether rows also see windows of other ranks, with exact gradients: more
            negatives for the same batch on each. False shows the rank's own.

    Raises:
        SettingError: A value is out of its range.
    """

    layout: Literal["packed", "paper", "previous_window"] = "packed"
    range: int = 3
    pack: int = 4
    stepping: bool = True
    d: int = 2
    w: int = 1
    differentiable: bool = True
    schedule: ScheduleConfig | None = None
    across_ranks: bool = False

    def __post_init__(self) -> None:
        check_at_least("model.crossbatch", self, 1, "pack", "d", "w")
        check_at_least("model.crossbatch", self, 0, "range")
        if self.layout not in ("packed", "paper", "previous_window"):
            fix = "Choose packed, paper or previous_window."
            raise SettingError("model.crossbatch.layout", self.layout, "is not known", fix)
        self.schedule = schedule_from(self.schedule)
        if self.schedule is not None and self.layout == "paper" and min(self.schedule.values) < 1:
            key, values = "model.crossbatch.schedule.values", self.schedule.values
            raise SettingError(key, values, "d is at least 1", "A row sees its own context.")

    @property
    def rows_of_a_text(self) -> int:
        """Consecutive rows of a batch that are consecutive windows of one text."""
        return 1 if self.layout == "paper" else self.pack

    @property
    def most(self) -> int:
        """The most contexts that a row is ever shown."""
        if self.schedule is not None:
            return max(self.schedule.values)
        return self.d if self.layout == "paper" else self.range

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> "CrossbatchConfig":
        """Settings of published models, by name.

        ``longllama-3b``: LongLLaMA's released continued pretraining; rows of a pack see (positives, negatives) =
            (0, 0), (1, 1), (2, 1), (3, 0). Exact, but in the first pack of a batch, which has no rows before it.
        ``longllama-7b``: the released formula with range 7: (0, 0), (1, 2), (2, 4), (3, 4). The 7B model's own
            mixture is not in the released code, so that this is not said to reproduce it.
        ``pg19``: the paper's d, 2 until step 450,000, then 64.
        ``dictionary``: the paper's d, 1 until an accuracy of 98 % (logged as ``val/accuracy``), then 128.
        ``mixed``: d drawn from 2 and 128 for each step.

        Batches must have room: d is at most the rows of a batch, so give ``schedule`` smaller values for smaller ones.

        Args:
            name: One of these.
            changes: Settings that differ.

        Raises:
            SettingError: There is no such recipe.
        """
        recipes: dict[str, dict[str, Any]] = {
            "longllama-3b": {"layout": "packed", "range": 3, "pack": 4, "stepping": True},
            "longllama-7b": {"layout": "packed", "range": 7, "pack": 4, "stepping": True},
            "pg19": {"layout": "paper", "schedule": ScheduleConfig("step", [2, 64], at=[450_000])},
            "dictionary": {
                "layout": "paper",
                "schedule": ScheduleConfig("metric", [1, 128], at=[0.98], metric="val/accuracy"),
            },
            "mixed": {"layout": "paper", "schedule": ScheduleConfig("draw", [2, 128])},
        }
        if name not in recipes:
            raise SettingError("model.crossbatch", name, "is not a recipe", f"Choose one of {', '.join(recipes)}.")
        return cls(**{**recipes[name], **changes})


@dataclass
class EvaluationConfig:
    """What is measured after training, always with the configured retriever beside exact search.

    Args:
        context_tokens: Memory sizes in tokens at which perplexity is measured.
        target_tokens: Tokens scored in each document, the same ones at every context size.
        distractor_tokens: Tokens of other held-out documents that stand in the memory before a document's longest
            context: perplexity against these, and the share of attention that stays with the document itself.
        distractor_paths: Files and folders of these other documents, from each path in turn: a memory of another
            domain. None takes held-out documents.
        documents: Held-out documents used for perplexity.
        passkey_tokens: Prompt lengths of the passkey task.
        passkey_samples: Prompts for each length.
        retrieval_queries: Real queries for each layer and KV head on which recall and time are measured.
        retrieval_repeats: Timed calls for each setting.
        query_grid: Query settings to measure, such as ``[{"ef_search": 64}, {"ef_search": 128}]``; None takes the
            backend's own grid.
        readings: How a context is read for perplexity and passkeys, always beside no context at all: ``memory``: into
            the memory, by the retriever and by exact search; ``full_context``: with what is scored in one window of
            the backbone, full attention in every layer; ``previous_window``: every layer sees ``model.memory.overlap``
            tokens of the window before (Transformer-XL); ``dilated``: memory layers see the text by the patterns of
            ``model.memory.segments`` (LongNet).
        exact_tokens: Up to so many tokens in memory the retriever has exact search at its side, whose time to read a
            text grows with the square of its length; None for all. What retrieval finds is compared with it anyway.
        score_factor: In place of ``model.memory.score_factor`` while it is measured: a model that was trained with soft
            scores, so that its keys lie far apart, asked with sharp ones. None leaves it.
        dictionary: The dictionary lookup of a model that was trained for it, at any size of memory; None leaves a task
            out, here and below (docs/tasks.md).
        distraction: Whose keys the attention goes to when the memory holds several documents.
        needles: Several pass keys in one text.
        key_value: Questions on one of many short documents.
        common_words: Which word of a long list is the most common.
        many_shot: Classification by the examples of a file.
        story: Losses of a story's continuation by distance.

    Raises:
        SettingError: A value is out of its range.
    """

    context_tokens: list[int] = field(default_factory=lambda: [1024, 4096, 8192])
    target_tokens: int = 1024
    distractor_tokens: list[int] = field(default_factory=list)
    distractor_paths: list[str] | None = None
    documents: int = 2
    passkey_tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    passkey_samples: int = 3
    retrieval_queries: int = 512
    retrieval_repeats: int = 5
    query_grid: list[dict[str, Any]] | None = None
    readings: list[Literal["memory", "full_context", "previous_window", "dilated"]] = field(
        default_factory=lambda: ["memory"]
    )
    exact_tokens: int | None = None
    score_factor: float | None = None
    dictionary: task_settings.DictionaryTask | None = None
    distraction: task_settings.DistractionTask | None = None
    needles: task_settings.NeedlesTask | None = None
    key_value: task_settings.KeyValueTask | None = None
    common_words: task_settings.CommonWordsTask | None = None
    many_shot: task_settings.ManyShotTask | None = None
    story: task_settings.StoryTask | None = None

    def __post_init__(self) -> None:
        prefix = "evaluation"
        for kind in task_settings.TASKS:
            setattr(self, kind.name, task_settings.read_task(kind, getattr(self, kind.name)))
        check_at_least(prefix, self, 1, "target_tokens", "documents", "retrieval_queries", "retrieval_repeats")
        check_at_least(prefix, self, 0, "passkey_samples")
        if self.exact_tokens is not None:
            check_at_least(prefix, self, 0, "exact_tokens")
        if self.score_factor is not None:
            check_factor(f"{prefix}.score_factor", self.score_factor)
        for name, minimum in (("context_tokens", 1), ("passkey_tokens", 64), ("distractor_tokens", 1)):
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                    raise SettingError(
                        f"{prefix}.{name}", getattr(self, name), f"{value!r} is below {minimum} tokens", "Correct it."
                    )
        known = ("memory", "full_context", "previous_window", "dilated")
        if not self.readings or any(reading not in known for reading in self.readings):
            raise SettingError(
                f"{prefix}.readings", self.readings, "names no reading", f"Choose among {', '.join(known)}."
            )
        if self.distractor_tokens and "memory" not in self.readings:
            raise SettingError(
                f"{prefix}.distractor_tokens", self.distractor_tokens, "stand in a memory", "Add memory to readings."
            )
        if self.distractor_paths is not None and not self.distractor_tokens:
            raise SettingError(
                f"{prefix}.distractor_paths",
                self.distractor_paths,
                "are of no use without distractor_tokens",
                "Say how many tokens of them stand in the memory: evaluation.distractor_tokens=[65536].",
            )
        if self.distractor_tokens and not self.context_tokens:
            raise SettingError(
                f"{prefix}.distractor_tokens",
                self.distractor_tokens,
                "needs context_tokens",
                "Say how much of the document itself is in memory.",
            )

    @property
    def tasks(self) -> list[task_settings.TaskSettings]:
        """Settings of the tasks that are asked for, in a fixed order."""
        return [settings for kind in task_settings.TASKS if (settings := getattr(self, kind.name)) is not None]

    def check_readings(self, memory: MemoryConfig) -> None:
        """Refuses readings that a model cannot do.

        Args:
            memory: The model's settings.

        Raises:
            SettingError: It cannot read so.
        """
        name = "evaluation.readings"
        if "full_context" in self.readings and memory.memory_layers and memory.positions == "none":
            raise SettingError(
                name,
                self.readings,
                "full_context needs the backbone's positions, and positions=none was trained without",
                "Leave full_context out.",
            )
        if ("dilated" in self.readings) != bool(memory.segments) or (memory.segments and "memory" in self.readings):
            raise SettingError(
                name,
                self.readings,
                f"with model.memory.segments={memory.segments} memory layers have "
                + ("dilated attention in place of a memory" if memory.segments else "no dilated attention"),
                "Set readings=[dilated], or segments=[] and dilations=[] for a memory.",
            )
        if "previous_window" not in self.readings:
            return
        if memory.memory_layers or not memory.overlap:
            given = f"memory_layers={memory.memory_layers}, overlap={memory.overlap}"
            raise SettingError(
                name,
                self.readings,
                f"previous_window is for local windows that share tokens, without a memory; here {given}",
                "Set model.memory.memory_layers=[] and overlap to half of window, or leave it out.",
            )
