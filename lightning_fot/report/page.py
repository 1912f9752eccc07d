"""One page that shows a run: self-contained, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lightning_fot.report import time_page
from lightning_fot.report.content import cells, curves, findings, formats, read, tables, task_tables
from lightning_fot.report.content.sweep_findings import sweep_findings
from lightning_fot.report.content.sweep_tables import sweep_tables
from lightning_fot.report.drawing import charts

# For phones, and for wide screens.
_FORMS = ("narrow", "wide")
_GLOSSARY = (
    (
        "Perplexity",
        "How surprised the model is by text: at 10 it hesitates as if between 10 likely tokens. Lower is better.",
    ),
    ("Memory", "Keys and values of tokens read before the local window. Only the memory layers look at it."),
    ("Exact search", "Compares a query with every key in memory: always right, and slower as the memory grows."),
    ("Index", "A structure (HNSW, IVF, ScaNN …) that finds most of the best keys without looking at all of them."),
    ("Recall@k", "Share of the k truly best keys that a search found."),
    ("Mass recall", "Share of the attention (softmax mass) of the k best keys that the found ones carry."),
    ("Mass", "Share of all attention on the memory that the found keys carry: how much of a full read is kept."),
    ("Passkey", "A number is told once in long filler text; the model is asked for it at the end."),
    ("Standard error", "How far a number would typically be off by chance of which text was scored."),
)


@dataclass(frozen=True)
class Figure:
    """A drawing with what stands around it.

    Attributes:
        legend: Samples and their names.
        drawn: SVG in a narrow and a wide form.
        caption: Below it.
    """

    legend: Sequence[tuple[Markup, str]]
    drawn: Markup
    caption: str


def page(results: read.Row, run_dir: Path) -> str:
    """The report as one HTML document.

    Args:
        results: Contents of ``results.json``; parts may be missing.
        run_dir: Folder of the run; ``metrics.csv`` and ``config.yaml`` are read from it where they exist.
    """
    script, style = _source("page.js"), _source("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = _title(results)
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            # Nothing may be loaded, and no script runs but ours: text of documents can do nothing, slip in as it may.
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
            style=Markup(style),
            script=Markup(script),
            title=title,
            header=_header(results, run_dir),
            findings=sweep_findings(results) if read.section(results, "sweep") else findings.find(results),
            perplexity=_perplexity(results),
            retrieval=_retrieval(results),
            tasks=_tasks(results),
            training=_training(results, run_dir),
            time=time_page.parts(results),
            sweep=_sweep(results),
            everything=_everything(results),
            run=_run(results, run_dir),
            glossary=_GLOSSARY,
        )
        + "\n"
    )


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    """Templates of the page; whatever they are given is escaped, unless it is marked as markup."""
    loader = FunctionLoader(lambda name: _source(f"templates/{name}"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"csv": cells.table_as_csv, "rows": _styled_rows}
    return environment


def _title(results: read.Row) -> str:
    if isinstance(title := results.get("title"), str):
        return title
    name = read.retriever_name(results)
    backbone = read.section(read.section(results, "config"), "model").get("backbone")
    memory = "Exact memory search" if name == "exact" else f"{name} against exact search"
    return f"{memory}, on {Path(str(backbone)).name}" if backbone else memory


def _header(results: read.Row, run_dir: Path) -> dict[str, str]:
    environment = read.section(results, "environment")
    memory = read.section(read.section(read.section(results, "config"), "model"), "memory")
    facts = [run_dir.resolve().name]
    for key in ("finished", "date", "time", "started"):
        if isinstance(value := results.get(key, environment.get(key)), str):
            facts.append(value[:16].replace("T", " "))
            break
    if memory.get("memory_layers"):
        facts.append("memory layers " + ", ".join(str(layer) for layer in _listed(memory["memory_layers"])))
    if memory.get("window"):
        facts.append(f"window {memory['window']} tokens")
    if memory.get("top_k"):
        facts.append(f"top {memory['top_k']} keys a query")
    if (seconds := read.total_seconds(results)) is not None:
        facts.append(formats.duration(seconds))
    # A sweep, or a Trainer of the user's own, is not expected to hold all that a run does.
    expected = not (read.section(results, "sweep") or read.section(results, "watched"))
    missing = findings.missing_parts(results) if expected else []
    complete = results.get("complete")
    text = ""
    if complete is False:
        text = "This run was stopped before its evaluation ended. "
        if read.section(results, "sweep"):
            text = "Not all cells of this sweep are done. "
        text += "" if missing else "Some numbers may be missing."
    if missing and (complete is not True or "perplexity" in missing):
        text += f"Not measured: {', '.join(missing)}."
    return {"facts": " · ".join(facts), "warning": text.strip()}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _figure(legend: Iterable[tuple[str, str]], drawn: Iterable[str], caption: str) -> Figure:
    """A figure of drawings and samples, which escape what they are given."""
    return Figure([(Markup(sample), name) for sample, name in legend], Markup("".join(drawn)), caption)


def _perplexity(results: read.Row) -> dict[str, Any] | None:
    lines = curves.perplexity_lines(results)
    if not lines:
        return None
    x_name, y_name = "context: tokens in memory before the scored text", "perplexity (lower is better)"
    figure = _values(lines, "Perplexity against context length", x_name, y_name, " The axis starts above zero.")
    return {"figure": figure, "tables": list(filter(None, (tables.perplexity(results), tables.multi_doc(results))))}


def _values(lines: Sequence[curves.Line], title: str, x_name: str, y_name: str, note: str = "") -> Figure:
    drawn = (charts.values(lines, form, title, x_name, y_name) for form in _FORMS)
    caption = f"{curves.error_note(lines)} Lines are drawn a few pixels apart.{note}".strip()
    return _figure(charts.values_legend(lines), drawn, caption)


def _retrieval(results: read.Row) -> dict[str, Any]:
    measured = [(measure, curves.recall_speed(results, measure)) for measure in curves.MEASURES]
    drawn = [(measure, data) for measure, data in measured if data is not None]
    ids = {"recall": "by-recall", "mass_recall": "by-mass"}
    figure = None
    if drawn:
        figure = _figure(charts.recall_speed_legend(drawn[0][1]), (), _recall_caption(drawn[0][1]))
    return {
        "panels": [
            {
                "measure": measure,
                "id": ids[measure],
                "name": data.x_name,
                "drawn": Markup("".join(charts.recall_speed(data, form) for form in _FORMS)),
            }
            for measure, data in drawn
        ],
        "legend": figure.legend if figure else (),
        "caption": figure.caption if figure else "",
        # A sweep has no setting that it runs with: its tables show all.
        "table": None if read.section(results, "sweep") else tables.retrieval(results),
        "inside": tables.in_run(results),
    }


def _recall_caption(data: curves.RecallSpeed) -> str:
    caption = f"{formats.tokens(data.memory_tokens)} keys a head. " if data.memory_tokens else ""
    if data.label_names:
        caption += f"Numbers at the points: {' · '.join(data.label_names)}; point at one for its details. "
    caption += "Strong lines join settings that no other one of the layer beats in both (Pareto front). "
    return caption + "The recall axis is logit-scaled: 0.9 to 0.99 takes as much room as 0.5 to 0.91. 1 stands apart."


def _tasks(results: read.Row) -> dict[str, Any]:
    found = task_tables.found(results)
    lines = curves.distraction_lines(results)
    figure = None
    if lines and len(lines[0].contexts) > 1:
        names = "documents in the memory", "attention that stays with the own one"
        figure = _values(lines, "Distraction", *names)
    return {"tables": found, "figure": figure}


def _training(results: read.Row, run_dir: Path) -> dict[str, Any]:
    found = [curve for curve in read.read_metrics(run_dir) if len(curve.values) > 1]
    figure = None
    if found:
        long = any(len(curve.values) > 15 for curve in found)
        caption = "Faint: every logged value. Strong: their moving average." if long else "Every logged value."
        figure = _figure(charts.loss_legend(found), (charts.losses(found, form) for form in _FORMS), caption)
    return {"figure": figure, "logged": tables.logged(results)}


def _everything(results: read.Row) -> dict[str, Any] | None:
    table = tables.everything(results)
    if table is None:
        return None
    shown, same = _without_constants(table)
    return {"table": table, "shown": shown, "same": same}


def _sweep(results: read.Row) -> dict[str, Any]:
    failed = read.section(read.section(results, "sweep"), "failures")
    return {"tables": sweep_tables(results), "failed": [(name, str(why)) for name, why in failed.items()]}


def _without_constants(table: cells.Table) -> tuple[cells.Table, str]:
    """The table without sizes that are the same in every row, and these in words."""
    constant = [
        index
        for index, heading in enumerate(table.columns)
        if heading in ("keys", "k") and len({row[index].raw for row in table.rows}) == 1
    ]
    kept = [index for index in range(len(table.columns)) if index not in constant]
    same = ", ".join(f"{table.columns[index]} {table.rows[0][index].text}" for index in constant)
    body = tuple(tuple(row[index] for index in kept) for row in table.rows)
    shown = replace(table, columns=tuple(table.columns[index] for index in kept), rows=body)
    return shown, f" All rows: {same}." if same else ""


def _styled_rows(table: cells.Table, sortable: bool) -> list[tuple[str, tuple[cells.Cell, ...]]]:
    """Rows with their classes: where a group begins, and which row the others are compared with."""
    found = []
    before: object = None
    for row in table.rows:
        styles: list[str] = []
        if not sortable and table.words == 2:
            styles += ["reference"] if row[1].text == "exact" else []
            styles += ["first"] if row[0].raw != before else []
        before = row[0].raw
        found.append((" ".join(styles), row))
    return found


def _run(results: read.Row, run_dir: Path) -> dict[str, Any]:
    environment = read.section(results, "environment")
    command, again = results.get("command", environment.pop("command", None)), ""
    path = run_dir / "config.yaml"
    if not command and path.is_file():
        again = "sweep" if read.section(results, "sweep") else "run"
        command = f"lightning {again} --config config.yaml"
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not config and results.get("config"):
        config = json.dumps(results["config"], indent=2, default=str)
    return {
        "again": again,
        "command": " ".join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "environment": _flat(environment),
        "config": config,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            inner = ", ".join(f"{label} {shown}" for label, shown in _flat(value))
            listed.append((name, inner))
        elif isinstance(value, list | tuple):
            listed.append((name, ", ".join(map(str, value))))
        elif value is not None:
            listed.append((name, str(value)))
    return listed
