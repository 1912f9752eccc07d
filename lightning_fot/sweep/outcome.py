"""What a sweep leaves: one table, one figure, one page, and the numbers as JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_fot.report.content.cells import rows_as_csv
from lightning_fot.sweep.cost_model import cost_model
from lightning_fot.sweep.grid import label_of
from lightning_fot.sweep.time_split import index_split, named_split
from lightning_fot.system.digests import read_sealed, write_sealed
from lightning_fot.system.environment import environment
from lightning_fot.system.files import write_text

if TYPE_CHECKING:
    from lightning_fot.sweep.folder import SweepFolder
    from lightning_fot.sweep.measure import IndexCell
    from lightning_fot.sweep.runs import RunCell
    from lightning_fot.sweep.settings import SweepConfig

SCHEMA = 1


class Outcome:
    """Collects the cells of a sweep and writes what is shown of them.

    Args:
        folder: Of the sweep.
        settings: The configuration without the section ``sweep``.
        config: That section.
        cells: Index cells.
        runs: Training cells.
        failures: Errors by the label of their cell.
        search: What a search has found (:meth:`~lightning_fot.sweep.search.Search.results`).
    """

    def __init__(
        self,
        folder: SweepFolder,
        settings: Mapping[str, Any],
        config: SweepConfig,
        cells: Sequence[IndexCell],
        runs: Sequence[RunCell],
        failures: Mapping[str, str],
        search: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.config = config
        self.cells = cells
        self.runs = runs
        self.failures = failures
        self.search = search

    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``: as a run's, with a section ``sweep``.

        ``retrieval`` and ``exact`` hold the cells of the largest batch and the first k, for the figure; ``sweep.cells``
        holds all of them, ``sweep.runs`` a row a run, ``sweep.cost_model`` what larger memories would cost.
        """
        known = [(cell, self.folder.read(cell.key)) for cell in self.cells]
        # What a grid and a search have both asked for is one row.
        unique = {(cell.key, json.dumps([row["query"], row["k"], row["batch"]], sort_keys=True)): row
                  for cell, found in known for row in cell.wanted(found)}  # fmt: skip
        rows = list(unique.values())
        trained = [(cell, self.folder.read(cell.key)) for cell in self.runs]
        done = not any(cell.missing(found) for cell, found in known) and all(
            (found or {}).get("rows") for _, found in trained
        )
        shown = [row for row in rows if self._in_figure(row)]
        exact = [row for row in shown if row["retriever"] == "exact"]
        return {
            "schema": SCHEMA,
            "complete": bool(done and (self.cells or self.runs) and (self.search or {}).get("complete", True)),
            "title": f"Sweep {self.folder.path.resolve().name}",
            "config": {**self.settings, "sweep": vars(self.config)},
            "environment": environment(),
            "retrieval": [{**row, "layer": _named(row)} for row in shown if row["retriever"] != "exact"],
            "exact": [{**row, "layer": _named(row)} for row in exact],
            "time_split": [*index_split(rows), *self._splits_of_runs()],
            "sweep": {
                "cells": rows,
                "runs": [
                    {**cell.combination, **row, "folder": cell.folder.path.name}
                    for cell, found in trained
                    for row in (found or {}).get("rows", [])
                ],
                "cost_model": cost_model(rows),
                "search": dict(self.search) if self.search is not None else None,
                "failures": dict(self.failures),
            },
        }

    def _splits_of_runs(self) -> list[dict[str, Any]]:
        found = []
        for cell in self.runs:
            try:
                results = read_sealed(cell.folder.results)
            except (OSError, ValueError):
                continue
            found += named_split(label_of(cell.combination), results)
        return found

    def _in_figure(self, row: Mapping[str, Any]) -> bool:
        return bool(row["batch"] == max(self.config.batch) and row["k"] == self.config.top_k[0])

    def write(self) -> dict[str, Any]:
        """Writes ``results.json``, the page, the figures, and ``cells.csv`` and the like: the rows of each part."""
        from lightning_fot.report import write_report

        results = self.results()
        write_sealed(self.folder.path / "results.json", results)
        for name in ("cells", "runs"):
            if results["sweep"][name]:
                write_text(self.folder.path / f"{name}.csv", rows_as_csv(results["sweep"][name]))
        if results["sweep"]["cost_model"]:
            write_text(self.folder.path / "cost_model.csv", rows_as_csv(results["sweep"]["cost_model"]))
        if self.search is not None and self.search["trials"]:
            write_text(self.folder.path / "trials.csv", rows_as_csv(self.search["trials"]))
        if results["sweep"]["cells"] or results["sweep"]["runs"]:
            write_report(results, self.folder.path)
        return results

    def print(self, results: Mapping[str, Any]) -> None:
        """The tables, for a terminal or as plain text, and where the files are."""
        from rich.console import Console

        from lightning_fot.report.content.sweep_tables import brief_tables
        from lightning_fot.report.content.tables import print_table

        console = Console()
        for table in brief_tables(results):
            print_table(table, console)
        for label, problem in self.failures.items():
            console.print(f"failed: {label}: {problem}", markup=False, highlight=False, soft_wrap=True)
        written = ("report.html", "recall_vs_speed.png", "time_split.png", "cells.csv", "runs.csv", "trials.csv",
                   "cost_model.csv", "time_split.csv", "results.json")  # fmt: skip
        files = [name for name in written if (self.folder.path / name).is_file()]
        listed = ", ".join(files)
        console.print(f"Results: {self.folder.path}  ({listed})", markup=False, highlight=False, soft_wrap=True)


def _named(row: Mapping[str, Any]) -> Any:
    """The layer, with the recording it is of where there are several."""
    return f"{row['layer']} ({row['recording']})" if row.get("recording") else row["layer"]
