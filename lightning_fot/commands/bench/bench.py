"""``lightning bench``: recall and speed of retrievers on recorded keys and queries; recording and tuning too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning_fot.bench.measure import SHIPPED_KEYS
from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.request.words import Option, Verb, read

DEFAULT_BATCHES = (1, 512)


_RECORDING = "recording: keys and queries of a model, on real text"
_TUNING = "tuning: retriever and settings for each memory layer"
_OPTIONS = (
    Option("config", "take the retriever and k from this configuration", short="-c", metavar="NAME|FILE"),
    Option(
        "retriever",
        'name, or JSON such as {"name": "hnsw", "M": 32}; may be repeated; default: all that can be used',
        many=True,
        metavar="NAME",
    ),
    Option("k", "neighbours wanted (default 32)", int),
    Option(
        "batch",
        "queries a bank in one call; may be repeated (default 1, as in decoding, and 512, as in reading)",
        int,
        many=True,
    ),
    Option("repeats", "timed passes over the queries (default 3)", int, 3),
    Option("min_index_size", "search exactly below this many keys (default 1: always the index)", int, 1),
    Option("json", "also write the rows as JSON; - prints them instead of the table", metavar="FILE"),
    Option(
        "record",
        "read text with the model of --config (default hnsw) and write its keys and queries to this .safetensors; "
        "--model.KEY=VALUE and --data.paths=[…] as in run; Ctrl-C keeps what was recorded so far",
        Path,
        metavar="OUT",
        group=_RECORDING,
    ),
    Option("tokens", "tokens whose keys are kept (default 122880)", int, 122_880, group=_RECORDING),
    Option("past", "past queries kept of each head (default 8192)", int, 8192, group=_RECORDING),
    Option("queries", "queries to measure with (default 2048)", int, 2048, group=_RECORDING),
    Option("dtype", "of the file (default float16)", str, "float16", choices=("float16", "float32"), group=_RECORDING),
    Option(
        "target-recall",
        "the fastest settings that find this share of the k best",
        float,
        metavar="SHARE",
        group=_TUNING,
    ),
    Option(
        "budget-ms",
        "the best settings whose call takes no longer, all heads of a layer",
        float,
        metavar="MS",
        group=_TUNING,
    ),
    Option("out", "write the settings found, for run --config hnsw --config YAML", metavar="YAML", group=_TUNING),
    Option("plot", "draw recall and speed of what was tried", metavar="PNG", group=_TUNING),
)


VERB = Verb(
    "lightning bench",
    _OPTIONS,
    settings=("model.", "data."),
    plain=("[FILE]",),
    plain_about=(
        ".npz or .safetensors with <name>_keys and <name>_queries, each (n, dim) or (banks, n, dim), and "
        "optionally <name>_past_queries; without one: keys and queries of SmolLM2 that come with the package",
    ),
    about="Recall and speed of retrievers on keys and queries of a model, exact search beside them. With --record, "
    "the keys and queries are recorded first; with --target-recall or --budget-ms, the settings that reach it are "
    "looked for.",
)


def _specs(given: Sequence[str], configured: Any) -> list[Any]:
    from lightning_fot.retrievers import available_retrievers, check_retriever

    specs: list[RetrieverSpec] = []
    for word in given:
        try:
            specs.append(json.loads(word) if word.lstrip().startswith("{") else word)
        except ValueError as error:
            raise SettingError(
                "retriever", word, f"is not JSON ({error})", 'Write {"name": "hnsw", "M": 32}.'
            ) from error
    if configured is not None and not specs:
        specs.append(configured)
    if not specs:
        specs = [name for name, info in available_retrievers().items() if info.importable]
    for spec in specs:
        check_retriever(spec)
    # Exact search first: it is what the others are compared with.
    return ["exact", *(spec for spec in specs if spec != "exact")]


def bench(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``bench``.
        program: How it was called.
        debug: Not used: every verb is called alike.

    Returns:
        Exit code: 0; 1 where nothing reaches what was asked for; 130 and 143 when recording was stopped by a signal.

    Raises:
        SettingError: An argument, the file or a retriever cannot be used.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    options, file = given.options, Path(given.plain[0]) if given.plain else None
    if options.record is not None:
        if file is not None:
            raise SettingError("file", str(file), "is not read with --record", "Leave it out.")
        from lightning_fot.sweep.recording import record

        wanted = (options.tokens, options.past, options.queries, options.dtype)
        return record(options.record, options.config or "hnsw", given.settings, *wanted, program=program)
    if given.settings:
        raise SettingError("arguments", given.settings[0], "only goes with --record", f"See {program} --help")
    _check_numbers(options)
    configured, k = None, options.k
    if options.config is not None:
        from lightning_fot.request.request import make_request

        request = make_request("bench", [options.config], [], program)
        configured = request.get("model.memory.retriever")
        k = request.get("model.memory.top_k") if k is None else k
    k = 32 if k is None else k
    if not isinstance(k, int) or k < 1:
        raise SettingError("k", k, "must be a whole number of at least 1", "Correct it.")
    specs = _specs(options.retriever, configured)
    file = file or SHIPPED_KEYS
    if not file.is_file():
        raise SettingError("file", str(file), "no such file", "Give a .npz or .safetensors of keys and queries.")
    if options.target_recall is not None or options.budget_ms is not None:
        from lightning_fot.commands.bench.tune import tune

        return tune(file, specs, k, options, program)
    rows = _measure(file, specs, k, options)
    if options.json == "-":
        print(json.dumps(rows, indent=2))
        return 0
    _print(rows, file)
    if options.json is not None:
        from lightning_fot.system.files import write_json

        write_json(Path(options.json), rows)
    return 0


def _check_numbers(options: SimpleNamespace) -> None:
    options.batch = options.batch or list(DEFAULT_BATCHES)
    counts = [("repeats", options.repeats), ("min_index_size", options.min_index_size)]
    for name, value in counts + [("batch", size) for size in options.batch]:
        if value < 1:
            raise SettingError(name, value, "must be a whole number of at least 1", "Correct it.")
    target, budget = options.target_recall, options.budget_ms
    if target is not None and not 0 < target <= 1:
        raise SettingError("target-recall", target, "must lie between 0 and 1", "Write --target-recall 0.95.")
    if budget is not None and not budget > 0:
        raise SettingError("budget-ms", budget, "must be above 0", "Write --budget-ms 0.5.")
    if target is not None and budget is not None:
        raise SettingError("budget-ms", budget, "cannot be had with --target-recall", "Give one of them.")
    for name in ("out", "plot"):
        if getattr(options, name) is None:
            continue
        path = Path(getattr(options, name))
        if target is None and budget is None:
            raise SettingError(name, str(path), "needs something to tune for", "Add --target-recall 0.95.")
        if path.is_dir() or not path.parent.is_dir():
            raise SettingError(name, str(path), "cannot be written there", "Give a file in a folder that exists.")


def _measure(file: Path, specs: Sequence[RetrieverSpec], k: int, options: SimpleNamespace) -> list[dict[str, Any]]:
    from lightning_fot.bench.measure import layer_of, load_metadata, load_qk, measure_retriever, scale_of, softcap_of
    from lightning_fot.config.retriever import layer_spec
    from lightning_fot.system.progress import JobProgress

    recorded, metadata = load_qk(file), load_metadata(file)
    rows: list[dict[str, Any]] = []
    with JobProgress(first_speed=None) as progress:  # a unit a retriever
        progress.plan([(f"{name}: {_label(spec)}", 1.0) for name in recorded for spec in specs])
        for name, tensors in recorded.items():
            layer = layer_of(name)
            for spec in specs:
                progress.start(f"{name}: {_label(spec)}")
                chosen = layer_spec(spec, layer)
                # Exact search has no index to wait for.
                own = chosen.get("min_index_size") if isinstance(chosen, dict) else None
                extra = {} if chosen == "exact" or own is not None else {"min_index_size": options.min_index_size}
                found = measure_retriever(
                    chosen,
                    tensors["keys"],
                    tensors["queries"],
                    tensors.get("past_queries"),
                    k=k,
                    scale=scale_of(name, metadata),
                    softcap=softcap_of(name, metadata),
                    repeats=options.repeats,
                    batch=options.batch,
                    **extra,
                )
                rows += [{"keys": name, "layer": layer, **row} for row in found]
                progress.finish(f"{name}: {_label(spec)}")
    return rows


def _label(spec: RetrieverSpec) -> str:
    return str(spec.get("name", "by layer")) if isinstance(spec, dict) else str(spec)


def _print(rows: Sequence[dict[str, Any]], file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for name in dict.fromkeys(row["keys"] for row in rows):
        group = [row for row in rows if row["keys"] == name]
        title = f"{file.name}: {name}, {group[0]['memory_tokens']:,} keys"
        table = Table(box=None, padding=(0, 1, 0, 0), title=title, title_justify="left")
        table.add_column("retriever", overflow="fold", min_width=18)
        for heading in ("recall", "mass", *(f"{size} at once" for size in batches), "build s", "MB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in group:
            if row["batch"] != group[0]["batch"]:
                continue
            same = [other for other in group if (other["retriever"], other["args"]) == (row["retriever"], row["args"])]
            calls = {other["batch"]: other for other in same}
            table.add_row(
                _setting(row, [other for other in group if other["retriever"] == row["retriever"]]),
                f"{row['recall']:.1%}",
                f"{row['mass_recall']:.1%}",
                *(_milliseconds(calls[size]) if size in calls else "" for size in batches),
                f"{row['build_s']:.2f}",
                f"{row['bytes'] / 1e6:.1f}",
            )
        console.print(table)
    console.print(
        f"recall: share of the {rows[0]['k']} best keys found. mass: share of their attention that those found hold. "
        "N at once: milliseconds of a call with N queries, p50/p95/p99.",
        highlight=False,
    )


def _milliseconds(row: dict[str, Any]) -> str:
    found = (row[f"search_ms_{share}"] for share in ("p50", "p95", "p99"))
    return "/".join(f"{value:.2f}" if value < 9.995 else f"{value:.0f}" for value in found)


def _setting(row: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Name and the settings in which rows of one retriever differ."""
    differ = [name for name, value in row["args"].items() if any(other["args"].get(name) != value for other in alike)]
    words = [f"{name}={row['args'][name]}" for name in differ]
    note = "" if row["index_used"] else "(too few keys: searched exactly)"
    return " ".join(part for part in (row["retriever"], *words, note) if part)
