"""Standard output and errors that end no work: a reader that has gone, and letters that a terminal does not know."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Stream(io.TextIOWrapper):
    """Text that goes nowhere once nobody reads it any more.

    The job goes on: who pipes its output into ``head`` wants the start of the output, not of the work.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def make_patient() -> None:
    """Replaces the streams of this process by ones that bear both; others, such as a test's, are left alone."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            # Closed by whoever started the program.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the end
        elif type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            with suppress(BrokenPipeError):
                stream.flush()
            patient = _Stream(
                stream.buffer,
                encoding=stream.encoding,
                # Signs that the encoding lacks are written out, as in a Python string.
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, patient)


def end() -> str | None:
    """Writes out what waits; says why where it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again when it ends, and complain in its own way.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error.strerror or str(error)
    return None
