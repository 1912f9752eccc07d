"""``python -m lightning_fot``: the same program as the script ``lightning-fot``."""

import sys

from lightning_fot.cli import main

if __name__ == "__main__":
    sys.exit(main())
