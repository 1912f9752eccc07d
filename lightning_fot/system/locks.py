"""Locks that say that a folder has a writer: they end with the process that holds them, however it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def lock(path: Path) -> IO[str] | None:
    """Locks a file, which is made where it is missing; it is held until what is returned is closed.

    Where the system has no such locks, nobody is kept out.

    Args:
        path: In a folder that is there.

    Returns:
        None where another process, or another call, holds it.

    Raises:
        OSError: It cannot be written.
    """
    while True:
        file = path.open("w")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        # Whoever held it before may have removed it between the two calls.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
