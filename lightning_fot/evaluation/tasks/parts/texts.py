"""Held-out documents for the tasks that take the user's own text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lightning_fot.config.tasks import TaskSettings

if TYPE_CHECKING:
    from torch import Tensor


class HeldOut(Protocol):
    """A document that is tokenised."""

    @property
    def name(self) -> str:
        """Where it came from."""
        ...

    @property
    def ids(self) -> Any:
        """Token numbers, (n,) integers."""
        ...


Texts = Mapping[str, Sequence[HeldOut]]


def select_texts(
    tasks: Sequence[TaskSettings],
    window: int,
    documents: Callable[[int, int], Sequence[HeldOut]],
    others: Callable[[Sequence[str] | None, str], Iterable[HeldOut]],
) -> dict[str, Sequence[HeldOut]]:
    """The documents of each task that takes some.

    Args:
        tasks: The tasks.
        window: The model's.
        documents: Gives held-out documents of so many tokens at least, so many at most.
        others: Gives documents of paths, or where these are None held-out ones; takes the name of the setting too.

    Raises:
        SettingError: There are too few, or a path holds no text.
    """
    found: dict[str, Sequence[HeldOut]] = {}
    for task in tasks:
        count, tokens = task.texts(window)
        if count:
            found[task.name] = documents(tokens, count)
            check_texts(task, window, found[task.name])
        if task.text_tokens:
            paths = others(task.text_paths, f"evaluation.{task.name}.paths")
            found[task.name] = _enough(paths, task.text_tokens)
    return found


def _enough(documents: Iterable[HeldOut], tokens: int) -> list[HeldOut]:
    """Documents of so many tokens together, or all there are."""
    found: list[HeldOut] = []
    for document in documents:
        found.append(document)
        tokens -= len(document.ids)
        if tokens <= 0:
            break
    return found


def check_texts(task: TaskSettings, window: int, texts: Sequence[HeldOut]) -> None:
    """Refuses too few or too short documents.

    Raises:
        SettingError: They are.
    """
    count, tokens = task.texts(window)
    long_enough = sum(len(text.ids) >= tokens for text in texts)
    if long_enough < count:
        problem = f"takes {count} held-out documents of {tokens} tokens, and there are {long_enough}"
        fix = "Use fewer or shorter ones, give longer documents, or raise data.heldout_fraction."
        raise task.error("tokens", problem, fix)


def ids_of(text: HeldOut, start: int, stop: int) -> Tensor:
    """Ids (stop - start,) int64."""
    import torch

    return torch.as_tensor(text.ids[start:stop]).long()
