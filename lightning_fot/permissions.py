"""Who may read what is written: libraries that write by way of temporary files leave them to their owner alone."""

from __future__ import annotations

import os
from pathlib import Path


def follow_umask(*paths: str | os.PathLike[str]) -> None:
    """Gives files and folders the permissions that ``open`` and ``mkdir`` give to new ones.

    Args:
        *paths: Each is there already.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in map(Path, paths):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
