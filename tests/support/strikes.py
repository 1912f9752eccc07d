"""Commands that write into a memory, hit by a signal at a moment of their work on the disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.patience import PATIENCE_S

# Runs a command in one forked process after the other, each hit when it has reached its count of changes on the
# disk (0: never), until one comes to its end. Everything is saved as often as possible.
_DRIVER = """
import json, os, signal, sys
import lightning_fot.library.ingest, lightning_fot.model.attach, transformers
from lightning_fot.cli import main

lightning_fot.library.ingest.SAVE_EVERY_S = lightning_fot.library.ingest.SAVE_AT_END_S = 0.0
lightning_fot.library.ingest.SAVE_SHARE = float("inf")
number, moments, words = json.loads(sys.argv[1])
codes = []
for moment in moments:
    child = os.fork()
    if not child:
        left = [moment]

        def strike(event, arguments):
            here = event in ("os.rename", "os.remove", "open") and "memories/mine" in str(arguments[0])
            if here and not (event == "open" and str(arguments[1]).startswith("r")):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), number)

        sys.addaudithook(strike)
        code = main(words)
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if codes[-1] == 0:
        break
print("codes", codes)
"""


def struck(repository: Path, here: Path, number: int, moments: list[int], *words: str) -> tuple[list[int], str]:
    """Exit codes of one attempt after the other, and all that they said.

    Args:
        repository: Where the package is.
        here: The working directory; the memory is ``mine``.
        number: The signal.
        moments: For each attempt, which change on the disk it does not survive; 0 for none.
        words: The command.
    """
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps([number, moments, words])],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    match = re.search(r"codes \[(.*)\]", done.stdout)
    assert match is not None, done.stdout
    return [int(code) for code in match[1].split(", ")], done.stdout
