"""Show a run: a page, figures and tables made from ``results.json`` and ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fot.report import figures, html
from lightning_fot.report.read import load_results
from lightning_fot.report.tables import print_tables

__all__ = ["load_results", "print_tables", "write_report"]


def write_report(results: Mapping[str, Any], run_dir: str | Path) -> list[Path]:
    """Write ``report.html``, ``recall_vs_speed.png`` and ``perplexity_vs_context.png`` into the run folder.

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
    report = run_dir / "report.html"
    part = run_dir / ".report.html.part"
    part.write_text(html.page(results, run_dir), encoding="utf-8")
    part.replace(report)
    written = [report]
    for name, write in (
        ("recall_vs_speed.png", figures.write_recall_vs_speed),
        ("perplexity_vs_context.png", figures.write_perplexity),
    ):
        if write(results, run_dir / name):
            written.append(run_dir / name)
    return written
