"""Waiting in tests: for conditions, and no shorter than a machine with other work may need."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

# Of what takes seconds alone. Whoever reaches it hangs. Below the limit of a test, so that it says what hung.
PATIENCE_S = 1500


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Waits for what a process is about to bring about.

    Args:
        condition: Asked again and again.
        process: May end once the condition holds, not before.
    """
    ends = time.monotonic() + PATIENCE_S
    while True:
        # Looked at first: it may do all the rest between this line and the next.
        ended = process.poll() is not None
        if condition():
            return
        assert not ended, "the process ended before"
        assert time.monotonic() < ends, "it takes for ever"
        time.sleep(0.002)
