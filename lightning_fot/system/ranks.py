"""Which process of a distributed job this is, told before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

# Set by whoever starts processes: torchrun, Lightning's own launcher, SLURM, LSF. As in lightning.fabric.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_FOLDER = "LIGHTNING_FOT_RUN_FOLDER"


def rank() -> int:
    """Rank of this process, 0 where there is one; of several nodes, some number above 0 on all but the first."""
    node = os.environ.get("NODE_RANK", "")
    first = int(node.isdigit() and int(node) > 0)
    for name in _RANKS:
        value = os.environ.get(name, "")
        if value.isdigit():
            # A local rank counts from 0 on every node.
            return max(first, int(value)) if name == "LOCAL_RANK" else int(value)
    return first


def share_folder(path: Path) -> None:
    """Tells the processes that this one will start which run folder it has chosen."""
    os.environ[_FOLDER] = str(path.resolve())


def shared_folder() -> Path | None:
    """The run folder that rank 0 has chosen, in a process that it has started; else None."""
    found = os.environ.get(_FOLDER)
    return Path(found) if found and rank() else None
