"""Which class makes the examples of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_fot.evaluation.tasks.dictionary import DictionaryLookup
from lightning_fot.evaluation.tasks.episode import Task
from lightning_fot.evaluation.tasks.settings import DictionaryTask, TaskSettings

_MAKERS: dict[str, Callable[..., Task]] = {DictionaryTask.name: DictionaryLookup}


def make_task(settings: TaskSettings, tokenizer: Any, window: int, local: int) -> Task:
    """The task with these settings; what cannot work is told now.

    Args:
        settings: Of the task.
        tokenizer: A Hugging Face tokenizer.
        window: The model's.
        local: Tokens of a prompt that stay local.

    Raises:
        SettingError: The settings do not fit the model or its tokenizer.
    """
    return _MAKERS[settings.name](settings, tokenizer, window, local)
