"""A document as training reads it: its ids with their special tokens, and which of them the loss counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fot.data.text.token_cache import Ids

Mask = npt.NDArray[np.bool_]
NOTHING: frozenset[Hashable] = frozenset()


@dataclass(frozen=True)
class Specials:
    """Tokens around documents and in empty places; ``bos`` and ``eos`` as far as the tokenizer has them."""

    bos: int | None
    eos: int | None
    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Those of a Hugging Face tokenizer."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None)
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, pad)


class TokenSequence(ABC):
    """Ids in their order; the first one is no target, whatever ``read`` says.

    Attributes:
        keys: What is in it (files, lines, records): two sequences that share a key are never read side by side.
        source: Number of its source in a mixture.
        name: Where it came from, for people; empty for what is made.
    """

    def __init__(self, keys: frozenset[Hashable] = NOTHING) -> None:
        self.keys = keys
        self.source = 0
        self.name = ""

    @abstractmethod
    def __len__(self) -> int:
        """Tokens, known without making them."""

    @abstractmethod
    def read(self, start: int, stop: int) -> tuple[Ids, Mask | None]:
        """Ids from ``start`` to ``stop`` (not beyond the end), and which are targets; None when all are."""


class TextSequence(TokenSequence):
    """Text, with the special tokens put around it as it is read: nothing is copied, so ``ids`` may be on disk.

    Args:
        ids: int32 (tokens,).
        before: Put before it, such as the start token.
        after: Put behind it.
        keys: As ``TokenSequence``.
    """

    def __init__(
        self, ids: Ids, before: int | None = None, after: int | None = None, keys: frozenset[Hashable] = NOTHING
    ) -> None:
        super().__init__(keys)
        self._ids = ids
        self._before = np.asarray([] if before is None else [before], np.int32)
        self._after = np.asarray([] if after is None else [after], np.int32)

    def __len__(self) -> int:
        return len(self._before) + len(self._ids) + len(self._after)

    def read(self, start: int, stop: int) -> tuple[Ids, None]:
        """Ids from ``start`` to ``stop``; all are targets."""
        parts = []
        for part in (self._before, self._ids, self._after):
            if start < len(part) and stop > 0:
                parts.append(part[max(start, 0) : stop])
            start, stop = start - len(part), stop - len(part)
        return (parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])), None


class MadeSequence(TokenSequence):
    """A document that is made when it is first read; its length is known before.

    Args:
        length: Tokens.
        make: Gives ids int32 (length,) and targets bool (length,) or None.
        keys: As ``TokenSequence``.
    """

    def __init__(
        self, length: int, make: Callable[[], tuple[Ids, Mask | None]], keys: frozenset[Hashable] = NOTHING
    ) -> None:
        super().__init__(keys)
        self._length = length
        self._make = make
        self._made: tuple[Ids, Mask | None] | None = None

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> tuple[Ids, Mask | None]:
        """Ids from ``start`` to ``stop``, and which are targets."""
        if self._made is None:
            self._made = self._make()
            if len(self._made[0]) != self._length:
                raise RuntimeError(f"made {len(self._made[0])} tokens of {self._length}")
        ids, targets = self._made
        return ids[start:stop], None if targets is None else targets[start:stop]
