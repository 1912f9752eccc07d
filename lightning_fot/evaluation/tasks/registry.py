"""Which class makes the examples of a task, or measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_fot.evaluation.tasks.dictionary import DictionaryLookup
from lightning_fot.evaluation.tasks.distraction import Distraction
from lightning_fot.evaluation.tasks.episode import Measure, Task
from lightning_fot.evaluation.tasks.settings import DictionaryTask, DistractionTask, TaskSettings
from lightning_fot.evaluation.tasks.texts import HeldOut, check_texts

if TYPE_CHECKING:
    from lightning_fot.lm import MemoryLM


def make_task(settings: TaskSettings, lm: MemoryLM, tokenizer: Any, texts: Sequence[HeldOut]) -> Task | Measure:
    """The task with these settings; what cannot work is told now.

    Args:
        settings: Of the task.
        lm: The model.
        tokenizer: Its tokenizer.
        texts: Held-out documents, as many as the settings ask for.

    Raises:
        SettingError: The settings do not fit the model, its tokenizer or the documents.
    """
    window = lm.config.window
    settings.check(window)
    check_texts(settings, window, texts)
    local = lm.config.last_context_length or window
    makers: dict[str, Callable[..., Task | Measure]] = {
        DictionaryTask.name: lambda: DictionaryLookup(settings, tokenizer, window, local),  # type: ignore[arg-type]
        DistractionTask.name: lambda: Distraction(settings, lm, texts),  # type: ignore[arg-type]
    }
    return makers[settings.name]()
