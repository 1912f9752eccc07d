"""The tables of a run: built once, shown on the terminal (rich) and in the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lightning_fot.report.content import curves, findings, formats, read, task_tables, time_tables
from lightning_fot.report.content.cells import Cell, Table, by_context

_NAME = 12  # characters that a second column of words has at least


def perplexity(results: read.Row) -> Table | None:
    """Perplexity: a row a memory kind, a column a context length."""
    measured = read.rows(results, "perplexity")
    table = read.by_context(measured, "value")
    contexts = sorted({context for cells in table.values() for context in cells})
    if not contexts:
        return None

    def cell(row: read.Row) -> Cell:
        value, error = read.number(row, "value"), read.standard_error(row)
        return Cell(formats.fixed(value) + (f" ± {formats.fixed(error)}" if error is not None else ""), value)

    body = by_context("", table, contexts, cell, "").rows + _changes(table, contexts)
    scored = {int(n) for row in measured if (n := read.number(row, "tokens", "n")) is not None}
    note = f"{formats.tokens(min(scored))} tokens scored, the same ones in every cell. " if len(scored) == 1 else ""
    over = f"± one standard error {curves.SAMPLED}. "
    note += over if any(read.standard_error(row) is not None for row in measured) else ""
    if len(body) > len(table) and any(read.number(row, "gain_standard_error") is not None for row in measured):
        note += "A change compares the same tokens with and without memory: its error is smaller than a value's."
    columns = ("memory", *(formats.tokens(context) for context in contexts))
    return Table("Perplexity by context length in tokens (lower is better)", columns, body, note=note.strip())


def _changes(table: dict[str, dict[int, read.Row]], contexts: list[int]) -> tuple[tuple[Cell, ...], ...]:
    """Change of perplexity against no memory, where the evaluation recorded the paired difference."""
    body = []
    for kind, cells in table.items():
        changes = {context: findings.paired_change(row) for context, row in cells.items()}
        if any(change is not None for change in changes.values()):
            row = [Cell(f"{curves.memory_name(kind)}, change", f"{kind} change")]
            for context in contexts:
                change = changes.get(context)
                text = formats.MISSING if change is None else formats.change(*change)
                row.append(Cell(text, None if change is None else change[0]))
            body.append(tuple(row))
    return tuple(body)


def multi_doc(results: read.Row) -> Table | None:
    """Perplexity with other documents in memory: a row a memory kind, a column an amount of them."""
    measured = read.rows(results, "multi_doc")
    amounts = sorted({int(n) for row in measured if (n := read.number(row, "distractor_tokens")) is not None})
    if not amounts:
        return None
    body = []
    for kind in read.memory_kinds(measured):
        own = {row["distractor_tokens"]: row for row in measured if row.get("memory") == kind}
        name = curves.memory_name(kind)
        fields = (
            ("", "value", formats.fixed),
            (", rise in nats", "rise_nats", lambda value: formats.fixed(value, 3)),
            (", own share", "own_share", formats.percent),
        )
        for words, field, shown in fields:
            values = [read.number(own.get(amount, {}), field) for amount in amounts]
            cells = (Cell(formats.MISSING if value is None else shown(value), value) for value in values)
            body.append((Cell(name + words, f"{kind} {field}"), *cells))
    context = read.number(measured[0], "context_tokens")
    note = f"{formats.tokens(context)} tokens of the document itself are in memory too; the same tokens are scored. "
    note += "Own share: of all attention on the memory, what stays with the document (1 is undistracted)."
    columns = ("memory", *(formats.tokens(amount) for amount in amounts))
    return Table("Perplexity by tokens of other documents in memory", columns, tuple(body), note=note)


def retrieval(results: read.Row) -> Table | None:
    """The run's own setting and exact search, layer by layer."""
    chosen = [row for row in read.configured_rows(results) if not read.is_exact(row)]
    names = read.varying_arguments(read.rows(results, "retrieval"))
    body: list[tuple[Cell, ...]] = []
    exact = read.rows(results, "exact")
    for layer in dict.fromkeys(row.get("layer") for row in [*chosen, *exact]):
        for row in [row for row in chosen if row.get("layer") == layer]:
            label = f"{row.get('retriever', '')} {read.setting(row, names)}".strip()
            body.append(_retrieval_cells(results, row, label))
        pair = next((read.exact_row(results, row) for row in chosen if row.get("layer") == layer), None)
        for row in [pair] if pair else [row for row in exact if row.get("layer") == layer][:1]:
            body.append(_retrieval_cells(results, row, "exact"))
    if not body:
        return None
    notes = []
    if any(not read.index_used(row) for row in chosen):
        notes.append("* The memory was too small for an index: searched exactly.")
    if chosen and not read.configured_is_certain(results):
        notes.append("The results do not name the run's query setting: the middle of those measured is shown.")
    notes.append(
        "Speed is relative to exact search of the same layer in the same run; a search time is the median of calls."
    )
    k = read.number(chosen[0] if chosen else exact[0], "k")
    columns = ("layer", "retriever", f"recall@{k:.0f}" if k else "recall", "mass recall", "search", "speed",
               "insert", "build", "bytes")  # fmt: skip
    return Table("Retrieval by layer", columns, tuple(body), words=2, note=" ".join(notes))


def in_run(results: read.Row) -> Table | None:
    """Retrieval as it was inside the run's own memory, layer by layer."""
    listed = read.rows(results, "retrieval_in_run")
    fields: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("memory_tokens", "keys", formats.tokens),
        ("recall", "recall", formats.percent),
        ("mass_recall", "mass recall", formats.percent),
        ("mass", "mass", formats.percent),
        ("sink_share", "sinks", formats.percent),
        ("hub_share", "hubs", formats.percent),
        ("indexed_share", "indexed", formats.percent),
        ("search_ms_p50", "search", lambda value: formats.brief(_seconds(value))),
        ("bytes", "bytes", formats.size),
    )
    shown = [field for field in fields if any(read.number(row, field[0]) is not None for row in listed)]
    if not shown:
        return None
    body = tuple(
        (
            Cell(str(row.get("layer", formats.MISSING)), row.get("layer")),
            *(Cell(text(read.number(row, key)), read.number(row, key)) for key, _, text in shown),
        )
        for row in listed
    )
    note = "The very memory that perplexity was measured with: part of it indexed, the newest keys searched exactly."
    if not read.rows(results, "perplexity"):
        note = "A memory of the run's own text, searched with the queries of the window that follows."
    if any(key in ("sink_share", "hub_share") for key, _, _ in shown):
        note += (
            " Sinks: share of what was found that is the first token of a window; hubs: share held by the most often"
        )
        note += " found hundredth of the keys."
    return Table("Retrieval inside the run", ("layer", *(heading for _, heading, _ in shown)), body, note=note)


def logged(results: read.Row) -> Table | None:
    """What a Trainer logged: a row a name, with its first and last value and how far it went."""
    listed = read.rows(results, "metrics")
    fields = ("first", "last", "least", "most")
    body = tuple(
        (
            Cell(str(row.get("name")), str(row.get("name"))),
            *(Cell(formats.significant(value, 4), value) for value in (read.number(row, field) for field in fields)),
            Cell(formats.tokens(read.number(row, "n")), read.number(row, "n")),
        )
        for row in listed
    )
    return Table("Everything logged", ("name", *fields, "times"), body) if body else None


def _retrieval_cells(results: read.Row, row: read.Row, label: str) -> tuple[Cell, ...]:
    keys = ("recall", "mass_recall", "search_ms_p50", "add_s", "build_s", "bytes")
    values = {key: read.number(row, key) for key in keys}
    ratio = read.speed_ratio(results, row)
    mark = "" if read.index_used(row) else " *"
    return (
        Cell(str(row.get("layer", formats.MISSING)), row.get("layer")),
        Cell(label + mark, label),
        Cell(formats.percent(values["recall"]), values["recall"]),
        Cell(formats.percent(values["mass_recall"]), values["mass_recall"]),
        Cell(formats.brief(_seconds(values["search_ms_p50"])), values["search_ms_p50"]),
        Cell(formats.times(ratio), ratio),
        Cell(formats.brief(values["add_s"]), values["add_s"]),
        Cell(formats.brief(values["build_s"]), values["build_s"]),
        Cell(formats.size(values["bytes"]), values["bytes"]),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


_FIELDS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("memory_tokens", "keys", formats.tokens),
    ("k", "k", formats.tokens),
    ("recall", "recall", formats.percent),
    ("mass_recall", "mass recall", formats.percent),
    ("mass", "mass", formats.percent),
    ("search_ms_p50", "ms p50", formats.significant),
    ("search_ms_p95", "ms p95", formats.significant),
    ("qps", "queries/s", formats.tokens),
    ("speed", "speed", formats.times),
    ("add_s", "insert", formats.brief),
    ("build_s", "build", formats.brief),
    ("bytes", "bytes", formats.size),
)


def everything(results: read.Row) -> Table | None:
    """All retrieval measurements, one row each; the raw setting also has the arguments that never change."""
    indexed = [row for row in read.rows(results, "retrieval") if not read.is_exact(row)]
    listed = [*indexed, *read.rows(results, "exact")]
    if not listed:
        return None
    names = read.varying_arguments(indexed)
    body = []
    for row in listed:
        ratio = read.speed_ratio(results, row)
        name = str(row.get("retriever", "exact"))
        cells = [
            Cell(str(row.get("layer", formats.MISSING)), row.get("layer")),
            Cell(name + ("" if read.index_used(row) else " *"), name),
            Cell(read.setting(row, names) or formats.MISSING, read.setting(row)),
        ]
        for key, _, shown in _FIELDS:
            value = ratio if key == "speed" else read.number(row, key)
            cells.append(Cell(shown(value), value))
        body.append(tuple(cells))
    columns = ("layer", "retriever", "setting", *(heading for _, heading, _ in _FIELDS))
    note = ""
    if not all(read.index_used(row) for row in listed):
        note = "* The memory was too small for an index: searched exactly."
    return Table("All retrieval measurements", columns, tuple(body), words=3, note=note)


def print_tables(results: read.Row, console: Console) -> None:
    """Print a run's results: the findings in words, then perplexity, tasks and retrieval.

    Args:
        results: Contents of ``results.json``; parts may be missing.
        console: Where to print.
    """
    for finding in findings.find(results):
        color = {"good": "green", "bad": "red"}.get(finding.verdict, "cyan")
        console.print(Text.assemble((f"{finding.topic}: ", "bold"), (finding.value, f"bold {color}")))
        console.print(Text(f"  {finding.text}"))
        if finding.caveat:
            console.print(Text(f"  {finding.caveat}", style="dim"))
    found = [perplexity(results), multi_doc(results), *task_tables.found(results), retrieval(results), in_run(results)]
    found.append(time_tables.limits(results))
    tables = [table for table in found if table is not None]
    for table in tables:
        print_table(table, console)
    if not tables:
        console.print("Nothing was measured.")


def print_table(table: Table, console: Console) -> None:
    """Print one table with its title and its note."""
    console.print()
    console.print(Text(table.title, style="bold"))
    for part in _fitting(table, console):
        console.print(_rich(part))
    if table.note:
        console.print(Text(table.note, style="dim"))


def _fitting(table: Table, console: Console) -> list[Table]:
    """The table, or where its numbers would be cut off, parts of its columns one below the other."""
    numbers = len(table.columns) - table.words
    if numbers < 2 or _width(table) <= console.width:
        return [table]
    first = table.words + (numbers + 1) // 2
    left = replace(table, columns=table.columns[:first], rows=tuple(row[:first] for row in table.rows))
    words = slice(table.words)
    right = replace(
        table,
        columns=table.columns[words] + table.columns[first:],
        rows=tuple(row[words] + row[first:] for row in table.rows),
    )
    return [*_fitting(left, console), *_fitting(right, console)]


def _width(table: Table) -> int:
    """Characters that the table takes when nothing that may not be broken is."""
    width = _padding(table) * (len(table.columns) - 1)
    for index, heading in enumerate(table.columns):
        texts = [heading, *(row[index].text for row in table.rows)]
        whole = index == 0 or index >= table.words
        width += max(cell_len(text) for text in texts) if whole else _NAME
    return width


def _padding(table: Table) -> int:
    # Nine columns have to fit in 80 characters.
    return 1 if len(table.columns) > 7 else 2


def _rich(table: Table) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, _padding(table), 0, 0))
    for index, heading in enumerate(table.columns):
        is_word = index < table.words
        # Names may be broken over lines on a narrow terminal, numbers may not.
        drawn.add_column(
            Text(heading, style="dim"),
            justify="left" if is_word else "right",
            no_wrap=index == 0 or not is_word,
            min_width=_NAME if 0 < index < table.words else None,
        )
    for row in table.rows:
        # Text, not str: a name with square brackets is no markup.
        drawn.add_row(*(Text(cell.text) for cell in row))
    return drawn
