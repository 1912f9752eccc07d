"""Settings of what is measured after training."""

from dataclasses import dataclass, field
from typing import Any

from lightning_fot.config import tasks as task_settings
from lightning_fot.config.attending import registry
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import SettingError, check_at_least, check_factor

# The reading of a text into one window of the backbone.
FULL_CONTEXT = "full_context"


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
            the backbone, full attention in every layer; the name of a way of attending (``model.memory.attending``)
            that reads texts as a whole, such as ``previous_window`` or ``dilated``.
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
        lookup: Facts told once each in text of the user's own, asked for in told words and in others.

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
    readings: list[str] = field(default_factory=lambda: ["memory"])
    exact_tokens: int | None = None
    score_factor: float | None = None
    dictionary: task_settings.DictionaryTask | None = None
    distraction: task_settings.DistractionTask | None = None
    needles: task_settings.NeedlesTask | None = None
    key_value: task_settings.KeyValueTask | None = None
    common_words: task_settings.CommonWordsTask | None = None
    many_shot: task_settings.ManyShotTask | None = None
    story: task_settings.StoryTask | None = None
    lookup: task_settings.LookupTask | None = None

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
        known = ("memory", *whole_readings())
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
        if FULL_CONTEXT in self.readings and memory.memory_layers and memory.positions == "none":
            raise SettingError(
                name,
                self.readings,
                "full_context needs the backbone's positions, and positions=none was trained without",
                "Leave full_context out.",
            )
        memory.way.check_readings(self.readings)
        for way in map(registry.find, self.readings):
            if way is not None:
                way.check_reading(self.readings, memory)


def whole_readings() -> dict[str, str]:
    """Readings that leave no memory behind, in words."""
    return {FULL_CONTEXT: "full context", **registry.readings()}
