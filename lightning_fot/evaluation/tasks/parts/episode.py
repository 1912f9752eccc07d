"""What a task is made of: texts that go into a memory, and local windows with answers in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lightning_fot.config.retriever import RetrieverSpec

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Probe:
    """Local tokens with answers in them; several questions may share a window, each seeing those before it.

    Args:
        ids: int32 (n,), the answers included.
        answers: Where each answer begins and ends; each token of it is predicted from all before.
        choices: Where answers are chosen among some: ids of each, the right one too, none the beginning of another. A
            token then counts as right when it is the most likely among those that go on in a choice.
        say: Of a wrong answer, how many tokens of what is said instead are noted.
    """

    ids: Ids
    answers: tuple[tuple[int, int], ...]
    choices: tuple[tuple[int, ...], ...] = ()
    say: int = 0


@dataclass(frozen=True)
class Episode:
    """A text in memory, and what is asked beside it; no question sees another probe's.

    Args:
        context: int32 (c,), goes into the memory.
        probes: Read one by one beside that memory, which they leave as it is.
        asked: In which words is asked, where one text is asked in several.
    """

    context: Ids
    probes: tuple[Probe, ...]
    asked: str = ""


@runtime_checkable
class Measure(Protocol):
    """A task that asks no questions: it measures by itself."""

    def measure(
        self, lm: MemoryLM, length: int, spec: RetrieverSpec | None, advance: Callable[[float], None]
    ) -> list[dict[str, Any]]:
        """Rows of one of the lengths that are set, JSON-able, with ``index_used``.

        Args:
            lm: The model.
            length: Tokens.
            spec: Specification of the retriever, None for no memory.
            advance: Called with the token passes done.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """Makes the examples of one task; the same ones every time."""

    def episodes(self, length: int) -> Sequence[Episode]:
        """The examples of one of the lengths that are set."""
        ...
