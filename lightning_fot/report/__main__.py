"""Make the reports of runs again: ``python -m lightning_fot.report RUN_DIR... [--overview FIGURE.png]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_fot.errors import MissingLibraryError
from lightning_fot.report import load_results, write_report
from lightning_fot.report.drawing import figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild reports; returns 0, or 2 with a message when a folder holds no results."""
    parser = argparse.ArgumentParser(prog="python -m lightning_fot.report", description=__doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder with a results.json")
    parser.add_argument(
        "--overview", metavar="PNG", type=Path, help="also write perplexity and recall of the first run as one figure"
    )
    options = parser.parse_args(arguments)
    try:
        for run_dir in options.run_dirs:
            for path in write_report(load_results(run_dir), run_dir):
                print(path)
        if options.overview is not None:
            if not figures.write_overview(load_results(options.run_dirs[0]), options.overview):
                raise ValueError(f"{options.run_dirs[0]} lacks perplexity or retrieval: no overview to draw")
            print(options.overview)
    except (OSError, ValueError, MissingLibraryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
