"""One page that shows a run: self-contained, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_fot.report import time_page
from lightning_fot.report.content import cells, curves, findings, formats, read, tables, task_tables
from lightning_fot.report.content.sweep_findings import sweep_findings
from lightning_fot.report.content.sweep_tables import sweep_tables
from lightning_fot.report.drawing import charts

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


def page(results: read.Row, run_dir: Path) -> str:
    """The report as one HTML document.

    Args:
        results: Contents of ``results.json``; parts may be missing.
        run_dir: Folder of the run; ``metrics.csv`` and ``config.yaml`` are read from it where they exist.
    """
    script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be loaded, and no script runs but ours: text from documents can do nothing even if it slipped through.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    title = _title(results)
    body = "".join(
        (_header(results, run_dir, title), "<main>", _findings(results), _perplexity(results), _retrieval(results),
         _tasks(results), _training(results, run_dir),
         time_page.section(results, _table, _download),
         _sweep(results) or _everything(results), _run(results, run_dir), _glossary(),
         "</main>", "<footer>Made by lightning-fot from results.json and metrics.csv of the run.</footer>")
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · lightning-fot</title><style>{style}</style></head>"
        f'<body>{body}<div id="tip" aria-hidden="true"></div><script>{script}</script></body></html>\n'
    )


def _title(results: read.Row) -> str:
    if isinstance(title := results.get("title"), str):
        return title
    name = read.retriever_name(results)
    backbone = read.section(read.section(results, "config"), "model").get("backbone")
    memory = "Exact memory search" if name == "exact" else f"{name} against exact search"
    return f"{memory}, on {Path(str(backbone)).name}" if backbone else memory


def _header(results: read.Row, run_dir: Path, title: str) -> str:
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
    warning = f'<p class="warning">{escape(text.strip())}</p>' if text else ""
    return (
        '<header><p class="kicker">lightning-fot · report</p><button id="theme" type="button" hidden></button>'
        f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(facts))}</p>{warning}</header>'
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _findings(results: read.Row) -> str:
    found = sweep_findings(results) if read.section(results, "sweep") else findings.find(results)
    if not found:
        return '<p class="lead">Nothing was measured yet.</p>'
    cards = "".join(
        f'<li class="{finding.verdict}"><p class="topic">{escape(finding.topic)}</p>'
        f'<p class="value">{escape(finding.value)}</p><p class="text">{escape(finding.text)}</p>'
        f'<p class="caveat">{escape(finding.caveat)}</p></li>'
        for finding in found
    )
    note = "One run with one seed: the numbers of another run will differ."
    return f'<ul class="findings">{cards}</ul><p class="note">{note}</p>'


def _legend(items: Sequence[tuple[str, str]]) -> str:
    return charts.legend([(sample, escape(name)) for sample, name in items])


def _perplexity(results: read.Row) -> str:
    lines = curves.perplexity_lines(results)
    if not lines:
        return ""
    table = tables.perplexity(results)
    x_name, y_name = "context: tokens in memory before the scored text", "perplexity (lower is better)"
    figure = _values(lines, "Perplexity against context length", x_name, y_name, " The axis starts above zero.")
    return (
        "<h2>Perplexity against context</h2>"
        '<p class="lead">The same held-out tokens are scored each time; only what is in memory before them changes.</p>'
        + figure
        + (_table(table) if table else "")
        + (_table(shared) if (shared := tables.multi_doc(results)) else "")
    )


def _values(lines: Sequence[curves.Line], title: str, x_name: str, y_name: str, note: str = "") -> str:
    drawn = "".join(charts.values(lines, form, title, x_name, y_name) for form in ("narrow", "wide"))
    caption = f"{curves.error_note(lines)} Lines are drawn a few pixels apart.{note}".strip()
    legend = _legend(charts.values_legend(lines))
    return f"<figure>{legend}{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _retrieval(results: read.Row) -> str:
    panels = [(measure, curves.recall_speed(results, measure)) for measure in curves.MEASURES]
    drawn = [(measure, data) for measure, data in panels if data is not None]
    # A sweep has no setting that it runs with: its tables show all.
    table = None if read.section(results, "sweep") else tables.retrieval(results)
    inside = tables.in_run(results)
    if not drawn and table is None:
        return f"<h2>Retrieval</h2>{_table(inside)}" if inside else ""
    parts = [
        "<h2>Recall against speed</h2>",
        '<p class="lead">An index gives up a little recall to search faster. Up and to the right is better; the star '
        "is exact search of the same layer, timed in the same run.</p>",
    ]
    if drawn:
        first = drawn[0][1]
        ids = {"recall": "by-recall", "mass_recall": "by-mass"}
        inputs = "".join(
            f'<input class="measure" type="radio" name="measure" id="{ids[measure]}"{" checked" if index == 0 else ""}>'
            for index, (measure, _) in enumerate(drawn)
        )
        labels = "".join(f'<label for="{ids[measure]}">{escape(data.x_name)}</label>' for measure, data in drawn)
        switch = f'<div class="switch">{labels}</div>' if len(drawn) > 1 else ""
        views = "".join(
            f'<div class="panel {measure}">'
            + "".join(charts.recall_speed(data, form) for form in ("narrow", "wide"))
            + "</div>"
            for measure, data in drawn
        )
        caption = _recall_caption(first)
        parts.append(
            f"<figure>{inputs}{switch}{_legend(charts.recall_speed_legend(first))}{views}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    for shown in (table, inside):
        parts.append(_table(shown) if shown else "")
    return "".join(parts)


def _recall_caption(data: curves.RecallSpeed) -> str:
    caption = f"{formats.tokens(data.memory_tokens)} keys a head. " if data.memory_tokens else ""
    if data.label_names:
        caption += f"Numbers at the points: {' · '.join(data.label_names)}; point at one for its details. "
    caption += "Strong lines join settings that no other one of the layer beats in both (Pareto front). "
    return caption + "The recall axis is logit-scaled: 0.9 to 0.99 takes as much room as 0.5 to 0.91. 1 stands apart."


def _tasks(results: read.Row) -> str:
    found = task_tables.found(results)
    if not found:
        return ""
    lines = curves.distraction_lines(results)
    figure = ""
    if lines and len(lines[0].contexts) > 1:
        names = "documents in the memory", "attention that stays with the own one"
        figure = f"<h3>Distraction</h3>{_values(lines, 'Distraction', *names)}"
    return "<h2>Tasks in long context</h2>" + figure + "".join(_table(table) for table in found)


def _training(results: read.Row, run_dir: Path) -> str:
    found = [curve for curve in read.read_metrics(run_dir) if len(curve.values) > 1]
    logged = tables.logged(results)
    listed = f"<h3>{escape(logged.title)}</h3>{_table(logged, sortable=True)}" if logged else ""
    if not found:
        return f"<h2>Training</h2>{listed}" if logged else ""
    drawn = "".join(charts.losses(found, form) for form in ("narrow", "wide"))
    long = any(len(curve.values) > 15 for curve in found)
    caption = "Faint: every logged value. Strong: their moving average." if long else "Every logged value."
    return (
        f"<h2>Training loss</h2><figure>{_legend(charts.loss_legend(found))}{drawn}"
        f"<figcaption>{escape(caption)}</figcaption></figure>{listed}"
    )


def _everything(results: read.Row) -> str:
    table = tables.everything(results)
    if table is None:
        return ""
    shown, same = _without_constants(table)
    note = f"Click a heading to sort. Times are of one call; speed is relative to exact search.{same}"
    return (
        f'<h2>Every retrieval measurement</h2><div class="tools"><p class="note">{escape(note)}</p>'
        f"{_download(table)}</div>" + _table(shown, sortable=True)
    )


def _sweep(results: read.Row) -> str:
    found = sweep_tables(results)
    parts = []
    for table in found:
        parts.append(
            f'<h2>{escape(table.title)}</h2><div class="tools"><p class="note">Click a heading to sort.</p>'
            f"{_download(table, table.title.lower().replace(' ', '_'))}</div>" + _table(table, sortable=True)
        )
    failed = read.section(read.section(results, "sweep"), "failures")
    if failed:
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(why))}</dd>" for name, why in failed.items())
        parts.append(f"<h2>Failed</h2><dl>{listed}</dl>")
    return "".join(parts)


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


def _table(table: cells.Table, sortable: bool = False) -> str:
    heads = []
    for index, heading in enumerate(table.columns):
        css = ' class="word"' if index < table.words else ""
        shown = escape(heading)
        inner = f'<button type="button">{shown}</button>' if sortable else shown
        heads.append(f'<th scope="col"{css}>{inner}</th>')
    body = []
    before: object = None
    for row in table.rows:
        styles: list[str] = []
        if not sortable and table.words == 2:
            styles += ["reference"] if row[1].text == "exact" else []
            styles += ["first"] if row[0].raw != before else []
        before = row[0].raw
        cells = "".join(_cell(cell, index, table.words) for index, cell in enumerate(row))
        body.append(f'<tr class="{" ".join(styles)}">{cells}</tr>' if styles else f"<tr>{cells}</tr>")
    title = escape(table.title)
    above = "" if sortable else f"<h3>{title}</h3>"
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'{above}<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table{" class=sortable" if sortable else ""} aria-label="{title}">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _cell(cell: cells.Cell, index: int, words: int) -> str:
    value = escape("" if cell.raw is None else str(cell.raw))
    attributes = f' data-value="{value}"'
    if cell.share is not None:
        attributes += f' style="--share: {cell.share:.3f}"'
    if index == 0:
        return f'<th scope="row"{attributes}>{escape(cell.text)}</th>'
    css = ' class="word"' if index < words else ""
    return f"<td{css}{attributes}>{escape(cell.text)}</td>"


def _download(table: cells.Table, name: str = "retrieval") -> str:
    """A link that holds the table as CSV, unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if cell.raw is None else cell.raw for cell in row] for row in table.rows])
    data = quote(buffer.getvalue())
    return f'<a class="button" download="{name}.csv" href="data:text/csv;charset=utf-8,{data}">Download CSV</a>'


def _run(results: read.Row, run_dir: Path) -> str:
    environment = read.section(results, "environment")
    command = results.get("command", environment.pop("command", None))
    parts = ["<h2>What was run</h2>"]
    if not command and (run_dir / "config.yaml").is_file():
        verb = "sweep" if read.section(results, "sweep") else "run"
        parts.append(f'<p class="lead">The {verb} again, from its folder:</p>')
        command = f"lightning {verb} --config config.yaml"
    if command:
        text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        parts.append(f"<pre>{escape(text)}</pre>")
    if environment:
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(environment))
        parts.append(f"<dl>{listed}</dl>")
    path = run_dir / "config.yaml"
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not config and results.get("config"):
        config = json.dumps(results["config"], indent=2, default=str)
    if config:
        parts.append(f"<details><summary>Resolved configuration</summary><pre>{escape(config)}</pre></details>")
    return "".join(parts) if len(parts) > 1 else ""


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


def _glossary() -> str:
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _GLOSSARY)
    return f"<details><summary>What the words mean</summary><dl>{listed}</dl></details>"
