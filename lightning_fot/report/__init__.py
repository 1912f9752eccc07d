"""Show a run: a page, figures and tables made from ``results.json`` and ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fot.report import page as html
from lightning_fot.report.content import time_tables
from lightning_fot.report.content.cells import rows_as_csv
from lightning_fot.report.content.read import load_results
from lightning_fot.report.content.tables import print_tables
from lightning_fot.report.drawing import figures
from lightning_fot.system.files import write_text

__all__ = ["load_results", "print_tables", "write_page", "write_report"]


def write_report(results: Mapping[str, Any], run_dir: str | Path) -> list[Path]:
    """Write ``report.html``, ``time_split.csv``, ``recall_vs_speed.png``, ``perplexity_vs_context.png``,
    ``distraction.png`` and ``time_split.png`` into the run folder.

    Parts that the results lack are left out, and the page says so; a figure without data is not written.

    Args:
        results: Contents of ``results.json``, complete or not.
        run_dir: The run's folder; ``metrics.csv`` and ``config.yaml`` are read from it where they exist.

    Returns:
        The files written, the page first.

    Raises:
        MissingLibraryError: matplotlib is not installed; the page is written all the same.
    """
    run_dir = Path(run_dir)
    written = [write_page(results, run_dir)]
    if rows := time_tables.csv_rows(results):
        written.append(run_dir / "time_split.csv")
        write_text(written[-1], rows_as_csv(rows))
    for name, write in (
        ("recall_vs_speed.png", figures.write_recall_vs_speed),
        ("perplexity_vs_context.png", figures.write_perplexity),
        ("distraction.png", figures.write_distraction),
        ("time_split.png", figures.write_time_split),
    ):
        if write(results, run_dir / name):
            written.append(run_dir / name)
    return written


def write_page(results: Mapping[str, Any], run_dir: Path) -> Path:
    """Write ``report.html`` alone: :func:`write_report` without the figures, which take longer to draw."""
    report = run_dir / "report.html"
    write_text(report, html.page(results, run_dir))
    return report
