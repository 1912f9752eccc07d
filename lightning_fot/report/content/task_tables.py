"""Tables of what was measured in long context besides perplexity: tasks, look-up, depths, distraction, stories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_fot.report.content import curves, formats, read
from lightning_fot.report.content.cells import Cell, Table, by_context


def found(results: read.Row) -> list[Table]:
    """All of these tables that there is something for."""
    others = [lookup(results), depths(results), distraction(results), story(results)]
    return [*tasks(results), *(table for table in others if table is not None)]


def tasks(results: read.Row) -> list[Table]:
    """Accuracy of each task: a row a memory kind, a column a length."""
    listed = read.rows(results, "tasks")
    tables = []
    for task in dict.fromkeys(str(row.get("task", "passkey")) for row in listed):
        own = [row for row in listed if str(row.get("task", "passkey")) == task]
        table = read.by_context(own, "accuracy")
        contexts = sorted({context for cells in table.values() for context in cells})

        def cell(row: read.Row) -> Cell:
            accuracy, n = read.number(row, "accuracy"), read.number(row, "n")
            text = formats.percent(accuracy, 0)
            if n is not None and accuracy is not None:
                text += f" ({round(accuracy * n)}/{n:.0f})"
            return Cell(text, accuracy, accuracy)

        if contexts:
            measured = "prompt length" if task == "passkey" else "memory"
            title = f"{task.replace('_', ' ').capitalize()} accuracy by {measured} in tokens"
            note = "Right answers of those asked for in brackets."
            accuracies = by_context(title, table, contexts, cell, note)
            tables.append(replace(accuracies, rows=accuracies.rows + _costs(table, contexts)))
    return tables


def _costs(table: dict[str, dict[int, read.Row]], contexts: list[int]) -> tuple[tuple[Cell, ...], ...]:
    """What a question and the memory take, of memory kinds where that was recorded."""
    fields: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("question_ms", "a question", lambda value: formats.brief(None if value is None else value / 1e3)),
        ("bytes", "bytes", formats.size),
    )
    body = []
    for kind, found in table.items():
        if not any("bytes" in row for row in found.values()):
            continue
        for field, words, shown in fields:
            values = [read.number(found.get(context, {}), field) for context in contexts]
            cells = (Cell(shown(value), value) for value in values)
            body.append((Cell(f"{curves.memory_name(kind)}, {words}", f"{kind} {field}"), *cells))
    return tuple(body)


def lookup(results: read.Row) -> Table | None:
    """Facts found, by memory kind and way of asking, and how far they were told apart; a column a length."""
    measured = read.rows(results, "lookup")
    lengths = sorted({int(n) for row in measured if (n := read.number(row, "context_tokens")) is not None})
    if not lengths:
        return None
    body = []
    for kind in read.memory_kinds(measured):
        for asked in dict.fromkeys(str(row.get("asked")) for row in measured):
            found = {row["context_tokens"]: row for row in measured
                     if (row.get("memory"), row.get("asked")) == (kind, asked)}  # fmt: skip
            cells = [found.get(length, {}) for length in lengths]
            counts = [read.number(row, "n") for row in cells]
            for field, words in (
                ("correct", "right"),
                ("distinct_wrong", "different wrong answers"),
                ("commonest", "commonest answer"),
            ):
                values = [read.number(row, field) for row in cells]
                shown = [
                    formats.MISSING
                    if value is None
                    else f"{value:.0f}" + (f"/{n:.0f}" if field != "distinct_wrong" else "")
                    for value, n in zip(values, counts, strict=True)
                ]
                head = (Cell(curves.memory_name(kind), kind), Cell(asked, asked), Cell(words, field))
                body.append((*head, *(Cell(text, value) for text, value in zip(shown, values, strict=True))))
    note = (
        "Each fact is told once, and asked for in the words it was told in and in other words. Commonest answer: how "
        "many questions got the same one; a model that tells its facts apart gives each answer once."
    )
    columns = ("memory", "words", "answers", *(formats.tokens(length) for length in lengths))
    return Table("Facts told apart by tokens of text", columns, tuple(body), words=3, note=note)


def depths(results: read.Row) -> Table | None:
    """Passkey accuracy by where the number stands: a row a memory kind and fifth of the filler, a column a length."""
    measured = read.rows(results, "passkey_depths")
    lengths = sorted({int(n) for row in measured if (n := read.number(row, "context_tokens")) is not None})
    if not lengths:
        return None
    body = []
    for kind in read.memory_kinds(measured):
        own = [row for row in measured if row.get("memory") == kind]
        for depth in sorted({row["depth"] for row in own}):
            found = {row["context_tokens"]: row for row in own if row["depth"] == depth}
            cells = (_rate(found.get(length, {})) for length in lengths)
            body.append((Cell(curves.memory_name(kind), kind), Cell(f"from {depth:.0%}", depth), *cells))
    note = (
        "Depth: the fifth of the filler that the number stands in, 0 % at its start. A dash: no prompt has it there. "
    )
    note += "In brackets the 95 % interval (Wilson)."
    columns = ("memory", "depth", *(formats.tokens(length) for length in lengths))
    return Table("Passkey accuracy by depth and prompt length", columns, tuple(body), words=2, note=note)


def distraction(results: read.Row) -> Table | None:
    """Share of the attention that stays with the own document: a row a memory kind, a column a number of documents."""
    measured = read.rows(results, "distraction")
    counts = sorted({int(n) for row in measured if (n := read.number(row, "documents")) is not None})
    if not counts:
        return None
    body = []
    lengths = sorted({int(n) for row in measured if (n := read.number(row, "context_tokens")) is not None})
    fields = (("own_share", ""), ("own_share_found", ", of what is found"), ("memory_mass", ", all on the memory"))
    for kind in read.memory_kinds(measured):
        for length in lengths:
            own = {
                row["documents"]: row
                for row in measured
                if (row.get("memory"), row.get("context_tokens")) == (kind, length)
            }
            for field, words in fields:
                name = curves.memory_name(kind) + (f", {formats.tokens(length)}" if len(lengths) > 1 else "") + words
                cells = []
                for count in counts:
                    value = read.number(own.get(count, {}), field)
                    error = read.number(own.get(count, {}), f"{field}_standard_error")
                    text = formats.percent(value) + ("" if error is None else f" ± {formats.percent(error)}")
                    cells.append(Cell(formats.MISSING if value is None else text, value, value))
                body.append((Cell(name, f"{kind} {field}"), *cells))
    note = (
        "Share of the attention on the memory that stays with the document itself (r_d, 1/d by chance); ± one standard "
    )
    note += "error over documents. The last row: of all attention, what goes to the memory."
    columns = ("memory", *(f"d={count}" for count in counts))
    return Table("Distraction by number of documents in memory", columns, tuple(body), note=note)


def story(results: read.Row) -> Table | None:
    """Losses of a continuation: a row a distance from the context, a column a memory kind and context."""
    measured = read.rows(results, "story")
    distances = sorted({int(n) for row in measured if (n := read.number(row, "distance")) is not None})
    if not distances:
        return None
    # Without a memory the same windows are read, whatever the context.
    shown = [("none", min(row["context_tokens"] for row in measured))]
    shown += [where for where in dict.fromkeys((row["memory"], row["context_tokens"]) for row in measured)
              if where[0] != "none"]  # fmt: skip
    own = {(row["memory"], row["context_tokens"], row.get("distance", "names")): row for row in measured}
    body = []
    places: list[int | str] = [*distances, *(["names"] if any("names" in row for row in measured) else [])]
    for distance in places:
        cells = []
        for kind, length in shown:
            row, field = own.get((kind, length, distance), {}), "nll" if kind == "none" else "gain"
            value = read.number(row, "nll" if kind == "none" else "gain_nats")
            error = read.number(row, f"{field}_standard_error")
            text = formats.MISSING if value is None else formats.fixed(value)
            cells.append(Cell(text + ("" if error is None else f" ± {formats.fixed(error)}"), value))
        head = "names" if isinstance(distance, str) else formats.tokens(distance)
        body.append((Cell(head, distance), *cells))
    names = (kind if kind == "none" else f"{kind}, {formats.tokens(length)}" for kind, length in shown)
    note = "None: nats a token; the others: nats saved on the same tokens. ± one standard error over stories. "
    note += "Names: nats a name that the context has and the local window so far has not; ± over stories."
    title = "A story's continuation by distance from its context"
    return Table(title, ("from", *names), tuple(body), note=note)


def _rate(row: read.Row) -> Cell:
    accuracy, low, high = (read.number(row, field) for field in ("accuracy", "low", "high"))
    text = formats.MISSING if accuracy is None else formats.percent(accuracy, 0)
    # Rows of older runs have no interval.
    if low is not None and high is not None:
        text += f" ({100 * low:.0f}–{100 * high:.0f})"
    return Cell(text, accuracy, accuracy)
