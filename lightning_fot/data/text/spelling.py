"""Which tokens of a vocabulary are spelled alike, whatever their case and the space before them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# How tokenizers write a space or a line break before a token, and what goes on within a word.
_BEFORE = ("Ġ", "Ċ", "▁", "##")
_known: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def spelling(tokenizer: Any) -> Tensor:
    """A number for each token id, the same for tokens that are spelled alike.

    Args:
        tokenizer: Its tokens are looked at once.

    Returns:
        (V + 1,) int64; -1 for tokens without a letter or digit, and for unknown tokens, which the last one stands for.
    """
    found = _known.get(tokenizer)
    if found is None:
        numbers: dict[str, int] = {}
        listed = []
        for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
            text = token or ""
            for mark in _BEFORE:
                text = text.removeprefix(mark)
            text = text.strip().casefold()
            word = any(letter.isalnum() for letter in text)
            listed.append(numbers.setdefault(text, len(numbers)) if word else -1)
        found = _known[tokenizer] = torch.tensor([*listed, -1], dtype=torch.int64)
    return found
