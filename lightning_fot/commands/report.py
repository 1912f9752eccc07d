"""``lightning report``: rebuilds the page of runs and sweeps, and compares several on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError
from lightning_fot.request.request import flat_settings
from lightning_fot.request.words import Option, Verb, read
from lightning_fot.sweep.runs import headline
from lightning_fot.sweep.time_split import named_split
from lightning_fot.system.digests import write_sealed

VERB = Verb(
    "lightning report",
    (
        Option("out", "compare the runs: write report.html there", Path, metavar="FOLDER"),
        Option("json", "print the headline numbers of each as JSON", None, False),
    ),
    plain=("RUN…",),
    plain_about=("folder of a run or of a sweep",),
    about="Rebuilds the report of run and sweep folders from their results.json; several runs are compared on one "
    "page, with --out.",
)


def report(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``report``.
        program: How it was called.
        debug: Not used: every verb is called alike.

    Returns:
        Exit code.

    Raises:
        SettingError: A folder holds no results, or the page cannot be written.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    options, folders = given.options, [Path(word) for word in given.plain]
    found = dict(zip(_names(folders), map(_read, folders), strict=True))
    from lightning_fot.report import write_report

    if options.out is None:
        for folder, results in zip(folders, found.values(), strict=True):
            for path in write_report(results, folder):
                print(path, file=sys.stderr if options.json else sys.stdout)
    else:
        if options.out.is_file():
            raise SettingError("out", str(options.out), "is a file", "Give a folder.")
        if (options.out / "results.json").is_file() and "comparison" not in _read(options.out):
            raise SettingError("out", str(options.out), "is the folder of a run", "Give another one.")
        options.out.mkdir(parents=True, exist_ok=True)
        compared = comparison(found)
        write_sealed(options.out / "results.json", compared)
        for path in write_report(compared, options.out):
            print(path, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({name: headline(results) for name, results in found.items()}, indent=2, default=str))
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise SettingError("RUN", [str(folder) for folder in folders], "names a folder twice", "Give each once.")
    count = 1
    while len({part[-count:] for part in parts}) < len(parts):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


def _read(folder: Path) -> dict[str, Any]:
    from lightning_fot.report import load_results

    try:
        return load_results(folder)
    except (OSError, ValueError) as error:
        raise SettingError(
            "RUN", str(folder), f"holds no results ({error})", "Give the folder of a run or of a sweep."
        ) from error


def comparison(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several runs as one: headline numbers side by side, their curves in one figure.

    Args:
        runs: Contents of ``results.json`` by a name for each.
    """
    perplexity: list[Any] = []
    tasks: list[Any] = []
    distraction: list[Any] = []
    indexed: list[Any] = []
    exact: list[Any] = []
    for name, results in runs.items():
        for target, section in ((perplexity, "perplexity"), (tasks, "tasks"), (distraction, "distraction")):
            rows = results.get(section) or []
            target += [{**row, "memory": f"{name}: {row['memory']}"} for row in rows if "memory" in row]
        for target, section in ((indexed, "retrieval"), (exact, "exact")):
            target += [{**row, "layer": f"{row.get('layer')} ({name})"} for row in results.get(section) or []]
    return {
        "schema": 1,
        "complete": True,
        "title": "Comparison of " + ", ".join(runs),
        "comparison": list(runs),
        "environment": next(iter(runs.values())).get("environment") or {},
        "perplexity": perplexity,
        "tasks": tasks,
        "distraction": distraction,
        "retrieval": indexed,
        "exact": exact,
        "time_split": [row for name, results in runs.items() for row in named_split(name, results)],
        "sweep": {"runs": [{"run": name, **_settings(runs, name), **headline(run)} for name, run in runs.items()]},
    }


def _settings(runs: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Settings of the model and its training in which the runs differ."""
    flat = {other: flat_settings(run.get("config") or {}) for other, run in runs.items()}
    keys = [key for key in flat[name] if key.partition(".")[0] in ("model", "data", "seed_everything")]
    differ = [key for key in keys if len({str(settings.get(key)) for settings in flat.values()}) > 1]
    return {key: flat[name][key] for key in differ[:8]}
