"""The ``lightning`` script: standard library only, so that it costs nothing to those who use another package's.

Other distributions declare a script of this name too (lightning-sdk does; Lightning itself, since 2.5.1, installs
none), and pip lets the last one installed win. So this one takes only its own command lines and hands over the rest.
"""

from __future__ import annotations

import os
import sys

from lightning_fot.commands.script import OPT_OUT, claims, find_other


def main() -> int | None:
    """Entry point of the script ``lightning``."""
    arguments = sys.argv[1:]
    opted_out = os.environ.get(OPT_OUT, "") not in ("", "0")
    if opted_out or not claims(arguments):
        other = find_other()
        if other is not None:
            result: int | None = other.load()()
            return result
        if opted_out:
            print(
                f"lightning: {OPT_OUT} is set and no other installed distribution has a 'lightning' command. "
                "Unset it, or use lightning-fot.",
                file=sys.stderr,
            )
            return 2
    from lightning_fot.cli import main as cli_main

    return cli_main(arguments)
