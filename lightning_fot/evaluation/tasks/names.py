"""Names that a text takes up again long after they were introduced: only a memory, or a guess, has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# A capital after a small letter or a comma and a blank: inside a sentence, where English has names.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
# Tokens before one that decide how it is decoded: bytes of a letter, marks of a word's start.
_BEFORE = 8


def far_names(tokenizer: Any, context: Sequence[int], target: Sequence[int], window: int) -> list[tuple[int, int]]:
    """Places in a continuation of names that its context has and its local window, so far, has not.

    Args:
        tokenizer: A Hugging Face tokenizer.
        context: Ids of the text before.
        target: Ids of the continuation; windows of its inputs begin at 0, ``window``, and so on.
        window: Tokens of a window.

    Returns:
        First token of each and the one behind its last, in order; each lies in the targets of one window.
    """
    known = set(re.findall(r"\b[A-Z][a-z]{2,}\b", tokenizer.decode(list(context))))
    pieces = [_piece(tokenizer, target, place) for place in range(len(target))]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    text = "".join(pieces)
    found = []
    for match in _NAME.finditer(text):
        inside = [t for t in range(1, len(target)) if starts[t] < match.end() and starts[t + 1] > match.start()]
        if not inside or match[0] not in known:
            continue
        first, stop = inside[0], inside[-1] + 1
        # Token t is a target of the window that holds t - 1 as an input.
        begin = (first - 1) // window * window
        local = text[starts[begin] : match.start()]
        if (stop - 2) // window * window == begin and not re.search(rf"\b{match[0]}\b", local):
            found.append((first, stop))
    return found


def _piece(tokenizer: Any, ids: Sequence[int], place: int) -> str:
    """What a token adds to the text."""
    before = list(ids[max(0, place - _BEFORE) : place])
    whole = str(tokenizer.decode([*before, ids[place]]))
    return whole[len(str(tokenizer.decode(before))) :]
