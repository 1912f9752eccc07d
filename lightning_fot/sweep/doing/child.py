"""``python -m lightning_fot.sweep.doing.child PARENT WORD…``: the command line, ended by the kernel with its parent.

A run whose sweep was killed would go on beside the next one, which goes on with the same folder.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Has this process killed as soon as its parent is gone; on Linux alone, elsewhere nothing happens.

    Args:
        parent: Number of the process that has started this one.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It was gone before.
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    del sys.argv[1]
    runpy.run_module("lightning_fot", run_name="__main__", alter_sys=True)
