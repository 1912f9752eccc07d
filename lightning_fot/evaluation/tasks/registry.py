"""Which class makes the examples of a task, or measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_fot.config import tasks as known
from lightning_fot.evaluation.tasks.common_words import CommonWords
from lightning_fot.evaluation.tasks.dictionary import DictionaryLookup
from lightning_fot.evaluation.tasks.distraction import Distraction
from lightning_fot.evaluation.tasks.key_value import KeyValue
from lightning_fot.evaluation.tasks.lookup import Lookup
from lightning_fot.evaluation.tasks.many_shot import ManyShot
from lightning_fot.evaluation.tasks.needles import Needles
from lightning_fot.evaluation.tasks.parts.episode import Measure, Task
from lightning_fot.evaluation.tasks.parts.texts import HeldOut, Texts, check_texts
from lightning_fot.evaluation.tasks.story import Story

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig
    from lightning_fot.config.memory import MemoryConfig


def make_tasks(
    config: EvaluationConfig, memory: MemoryConfig, tokenizer: Any, texts: Texts
) -> dict[str, Task | Measure]:
    """All tasks of an evaluation by name; what cannot work is told now.

    Args:
        config: What to measure.
        memory: Settings of the model's memory.
        tokenizer: Its tokenizer.
        texts: By task, the held-out documents that it asks for.

    Raises:
        SettingError: Settings do not fit the model, its tokenizer or the documents.
    """
    return {task.name: make_task(task, memory, tokenizer, texts.get(task.name, ())) for task in config.tasks}


def make_task(
    settings: known.TaskSettings, memory: MemoryConfig, tokenizer: Any, texts: Sequence[HeldOut]
) -> Task | Measure:
    """The task with these settings; what cannot work is told now.

    Args:
        settings: Of the task.
        memory: Settings of the model's memory.
        tokenizer: Its tokenizer.
        texts: Held-out documents, as many as the settings ask for.

    Raises:
        SettingError: The settings do not fit the model, its tokenizer or the documents.
    """
    window = memory.window
    settings.check(window)
    check_texts(settings, window, texts)
    local = memory.last_context_length or window
    makers: dict[type[known.TaskSettings], Callable[[Any], Task | Measure]] = {
        known.DictionaryTask: lambda given: DictionaryLookup(given, tokenizer, window, local),
        known.DistractionTask: lambda given: Distraction(given, texts),
        known.NeedlesTask: lambda given: Needles(given, tokenizer),
        known.KeyValueTask: lambda given: KeyValue(given, tokenizer),
        known.LookupTask: lambda given: Lookup(given, tokenizer, texts),
        known.CommonWordsTask: lambda given: CommonWords(given, tokenizer),
        known.ManyShotTask: lambda given: ManyShot(given, tokenizer, local),
        known.StoryTask: lambda given: Story(given, tokenizer, texts),
    }
    return makers[type(settings)](settings)
