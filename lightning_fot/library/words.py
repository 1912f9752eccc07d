"""The words of an answer while its tokens come: whole characters, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Words:
    """Turns tokens into text that never has to be taken back.

    Args:
        decode: Text of token ids.
        stops: The answer ends before the first of these.
        trim: Whether spaces before it are left out: a chat template may leave them to the answer.

    Example:
        >>> words = Words(lambda ids: bytes(ids).decode(errors="replace"), ["END"])
        >>> [words.add(byte) for byte in "aE".encode()], words.add(ord("b")), words.stopped
        (['a', ''], 'Eb', False)
        >>> [words.add(byte) for byte in b"cEND"], words.stopped
        (['c', '', '', ''], True)
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), trim: bool = False) -> None:
        self.stopped = False
        """Whether one of the stops has come."""
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        # Decoding begins at a token before what is new: what a token says may depend on the one before it.
        self._begin = self._said = 0
        self._held = ""
        self._trim = trim

    def add(self, token: int) -> str:
        """Takes a token; gives the text that is certain now."""
        self._tokens.append(token)
        return self._take(self._new(whole=False))

    def end(self) -> str:
        """The rest, once there are no more tokens."""
        text = self._take(self._new(whole=True))
        rest, self._held = "" if self.stopped else self._held, ""
        return text + rest

    def _new(self, whole: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._said])
        now = self._decode(self._tokens[self._begin :])
        if not whole and (now.endswith(_INCOMPLETE) or len(now) <= len(before)):
            return ""
        self._begin, self._said = self._said, len(self._tokens)
        return now[len(before) :]

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._trim:
            text = text.lstrip(" ")
            self._trim = not text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            said, self._held = self._held[: min(places)], ""
            return said
        # The end of it may be the beginning of a stop.
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        said, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return said


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that the stop begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
