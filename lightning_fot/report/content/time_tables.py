"""What the time of reading and answering went into, and what the machine would allow at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_fot.report.content import curves, formats, read
from lightning_fot.report.content.cells import Cell, Table

PARTS = {"model_s": "model", "search_s": "search", "insert_s": "insert", "build_s": "build"}
"""Parts of a row of ``time_split``, in the order in which they are stacked."""
_STEPS = {
    "reading": "Reading into the memory",
    "scoring": "Scoring text beside the memory",
    "asking": "Answering questions beside the memory",
    "decoding": "Writing token by token beside the memory",
    "searching": "Searching an index",
}
_CSV = ("task", "step", "memory", "context_tokens", "tokens", "seconds", *PARTS, "beside_s")


@dataclass(frozen=True)
class Bar:
    """Time of one memory kind.

    Args:
        name: Of the memory.
        total: Milliseconds a token.
        parts: By name, milliseconds a token each; those of no time are left out.
        beside: Milliseconds a token of building in another thread.
        same: Whether the numbers are another row's, since no index took part.
    """

    name: str
    total: float
    parts: dict[str, float]
    beside: float
    same: bool


@dataclass(frozen=True)
class Group:
    """Bars that are compared: one step of one task.

    Args:
        title: What was done.
        bars: One a memory kind.
    """

    title: str
    bars: tuple[Bar, ...]


def groups(results: read.Row) -> list[Group]:
    """One for each step of each task, at the largest memory that was measured."""
    found: dict[tuple[str, str], list[read.Row]] = {}
    for row in read.rows(results, "time_split"):
        if (read.number(row, "tokens") or 0) > 0 and (read.number(row, "seconds") or 0) > 0:
            found.setdefault((str(row.get("task")), str(row.get("step"))), []).append(row)
    tasks, steps = list(dict.fromkeys(task for task, _ in found)), list(_STEPS)
    ordered = sorted(
        found, key=lambda key: (tasks.index(key[0]), steps.index(key[1]) if key[1] in steps else len(steps))
    )
    return [_group(task, step, found[task, step]) for task, step in ordered]


def _group(task: str, step: str, listed: list[read.Row]) -> Group:
    largest = max(read.number(row, "context_tokens") or 0 for row in listed)
    by_kind: dict[str, read.Row] = {}
    for row in listed:
        # Without a memory a size means nothing.
        kind = str(row.get("memory", "none"))
        if (read.number(row, "context_tokens") or 0) == largest or kind.endswith("none"):
            by_kind[kind] = row
    kinds = read.memory_kinds(by_kind.values())
    title = _STEPS.get(step, step.capitalize())
    size = formats.tokens(largest)
    if step == "searching":
        title += f": {formats.tokens(read.number(listed[0], 'tokens'))} queries at once, {size} keys a head"
    elif step == "reading":
        title += f": {size} tokens"
    else:
        title += f" of {size} tokens"
    if task not in ("decoding", "index"):
        title += f" ({task.replace('_', ' ')})"
    return Group(title, tuple(_bar(kind, by_kind[kind]) for kind in kinds))


def _bar(kind: str, row: read.Row) -> Bar:
    tokens = read.number(row, "tokens") or 1.0
    ms = {part: 1e3 * (read.number(row, part) or 0.0) / tokens for part in (*PARTS, "seconds", "beside_s")}
    parts = {name: ms[part] for part, name in PARTS.items() if ms[part] > 0}
    return Bar(curves.memory_name(kind), ms["seconds"], parts, ms["beside_s"], bool(row.get("same_as")))


def time_split(results: read.Row) -> Table | None:
    """A row a step and memory kind: milliseconds a token, and of them each part."""
    found = groups(results)
    if not found:
        return None
    body = []
    for group in found:
        for bar in group.bars:
            cells = [Cell(_ms(bar.parts.get(name)), bar.parts.get(name, 0.0)) for name in PARTS.values()]
            body.append(
                (
                    Cell(group.title, group.title),
                    Cell(bar.name + (" *" if bar.same else ""), bar.name),
                    Cell(_ms(bar.total), bar.total),
                    *cells,
                    Cell(_ms(bar.beside or None), bar.beside),
                )
            )
    note = "Milliseconds a token (a query, where an index is searched). Model: all the rest, gathering of pairs "
    note += "included. Build: waiting for indexes; built beside: building in another thread meanwhile, which slows the "
    note += "rest where cores are few."
    if any(bar.same for group in found for bar in group.bars):
        note += " * No index took part: the numbers of the row above."
    columns = ("step", "memory", "ms a token", *PARTS.values(), "built beside")
    return Table("What reading and answering took", columns, tuple(body), words=2, note=note)


def _ms(value: float | None) -> str:
    return formats.MISSING if value is None else formats.significant(value, 2)


def csv_rows(results: read.Row) -> list[dict[str, object]]:
    """All rows of ``time_split``, unrounded, in columns that are always the same."""
    return [{name: row.get(name) for name in _CSV} for row in read.rows(results, "time_split")]


def limits(results: read.Row) -> Table | None:
    """Measured times beside the least that the machine allows."""
    body: list[tuple[Cell, ...]] = []
    for row in read.rows(results, "decoding"):
        tokens = read.number(row, "memory_tokens") or 0.0
        held = f", {formats.tokens(tokens)} in memory" if tokens else ""
        body += _limit(row, f"a token{held}", curves.memory_name(str(row.get("memory"))), "ms_p50")
    chosen = [row for row in read.configured_rows(results) if not read.is_exact(row)]
    for row in [*chosen, *read.rows(results, "exact")]:
        batch = read.number(row, "batch")
        size = "" if batch is None else f", {formats.tokens(batch)} queries"
        name = str(row.get("retriever", "exact")) + ("" if read.index_used(row) else " *")
        body += _limit(row, f"layer {row.get('layer')}{size}", name, "search_ms_p50")
    if not body:
        return None
    rates = {
        str(row.get("limit_by")): read.number(row, "limit_rate")
        for section in ("decoding", "exact", "retrieval")
        for row in read.rows(results, section)
    }
    note = (
        "A token written, and a search of so many queries a head. Bound: the least time of exact search or of a full "
    )
    note += "read, at what this machine did when it was measured"
    known: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("bandwidth", lambda rate: f"{rate / 1e9:.1f} GB/s read from memory"),
        ("products", lambda rate: f"{rate / 1e9:.0f} GFLOP/s in products"),
    )
    said = [shown(rate) for name, shown in known if (rate := rates.get(name))]
    note += f" ({', '.join(said)}). " if said else ". "
    note += "A token reads every weight once, and with exact search every key; an index reads fewer keys, so it may "
    note += "pass 100%."
    columns = ("what", "memory", "measured", "bound", "by", "reached")
    return Table("Limits beside measurements", columns, tuple(body), words=2, note=note)


def _limit(row: read.Row, what: str, name: str, field: str) -> list[tuple[Cell, ...]]:
    measured, bound, share = (read.number(row, key) for key in (field, "limit_ms", "of_limit"))
    if measured is None or bound is None:
        return []
    by = str(row.get("limit_by", formats.MISSING))
    return [
        (
            Cell(what, what),
            Cell(name, name),
            Cell(formats.brief(measured / 1e3), measured),
            Cell(formats.brief(bound / 1e3), bound),
            Cell(by, by),
            Cell(formats.percent(share, 0), share),
        )
    ]
