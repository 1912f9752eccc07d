"""``lightning bench``: recall and speed of retrievers on recorded keys and queries, without a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fot.arguments import Parser
from lightning_fot.errors import SettingError

SHIPPED_KEYS = Path(__file__).parent / "testing_qk.npz"


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program,
        description="Recall and speed of retrievers on keys and queries of a model, exact search beside them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help=".npz or .safetensors with <name>_keys and <name>_queries, each (n, dim) or (banks, n, dim), and "
        "optionally <name>_past_queries; without one: keys and queries of SmolLM2 that come with the package",
    )
    parser.add_argument(
        "--config", "-c", help="take the retriever and k from this configuration (file or shipped name)"
    )
    parser.add_argument(
        "--retriever",
        action="append",
        metavar="NAME",
        help='name, or JSON such as {"name": "hnsw", "M": 32}; may be repeated; default: all that can be used',
    )
    parser.add_argument("--k", type=int, help="neighbours wanted (default 32)")
    parser.add_argument("--batch", type=int, help="queries a bank in one call (default all; 1 is decoding)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each setting (default 3)")
    parser.add_argument(
        "--min_index_size",
        type=int,
        default=1,
        help="search exactly below this many keys (default 1: always the index)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the rows as JSON; - prints them instead of the table"
    )
    return parser


def _specs(given: Sequence[str] | None, configured: Any) -> list[Any]:
    from lightning_fot.retrievers import available_retrievers, check_retriever

    specs: list[Any] = []
    for word in given or []:
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


def bench(words: Sequence[str], program: str = "lightning-fot bench") -> int:
    """Runs the command.

    Args:
        words: Words after ``bench``.
        program: How it was called.

    Returns:
        0.

    Raises:
        SettingError: An argument, the file or a retriever cannot be used.
    """
    try:
        options = _parser(program).parse_args(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    configured, k = None, options.k
    if options.config is not None:
        from lightning_fot.request import read_request

        request = read_request("bench", ["--config", options.config])
        configured = request.get("model.memory.retriever")
        k = k or request.get("model.memory.top_k")
    k = 32 if k is None else k
    for name, value in (("k", k), ("repeats", options.repeats), ("min_index_size", options.min_index_size)):
        if not isinstance(value, int) or value < 1:
            raise SettingError(name, value, "must be a whole number of at least 1", "Correct it.")
    specs = _specs(options.retriever, configured)
    file = options.file or SHIPPED_KEYS
    if not file.is_file():
        raise SettingError("file", str(file), "no such file", "Give a .npz or .safetensors of keys and queries.")
    rows = _measure(file, specs, k, options)
    if options.json == "-":
        print(json.dumps(rows, indent=2))
        return 0
    _print(rows, file)
    if options.json is not None:
        from lightning_fot.run_folder import write_json

        write_json(Path(options.json), rows)
    return 0


def _measure(file: Path, specs: Sequence[Any], k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from lightning_fot.bench import load_qk, measure_retriever
    from lightning_fot.progress import JobProgress

    recorded = load_qk(file)
    rows: list[dict[str, Any]] = []
    with JobProgress() as progress:
        progress.plan([(f"{name}: {_label(spec)}", 1.0) for name in recorded for spec in specs])
        for name, tensors in recorded.items():
            for spec in specs:
                progress.start(f"{name}: {_label(spec)}")
                # Exact search has no index to wait for.
                own = spec.get("min_index_size") if isinstance(spec, dict) else None
                extra = {} if spec == "exact" or own is not None else {"min_index_size": options.min_index_size}
                found = measure_retriever(
                    spec,
                    tensors["keys"],
                    tensors["queries"],
                    tensors.get("past_queries"),
                    k=k,
                    repeats=options.repeats,
                    batch=options.batch,
                    **extra,
                )
                rows += [{"keys": name, **row} for row in found]
                progress.finish(f"{name}: {_label(spec)}")
    return rows


def _label(spec: Any) -> str:
    return str(spec.get("name")) if isinstance(spec, dict) else str(spec)


def _print(rows: Sequence[dict[str, Any]], file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name in dict.fromkeys(row["keys"] for row in rows):
        group = [row for row in rows if row["keys"] == name]
        title = f"{file.name}: {name}, {group[0]['memory_tokens']:,} keys"
        table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
        table.add_column("retriever", overflow="fold")
        for heading in ("recall", "mass", "queries/s", "ms a call", "build s", "MB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in group:
            table.add_row(
                _setting(row, [other for other in group if other["retriever"] == row["retriever"]]),
                f"{row['recall']:.1%}",
                f"{row['mass_recall']:.1%}",
                f"{row['qps']:,.0f}",
                f"{row['search_ms_p50']:.2f}",
                f"{row['build_s']:.2f}",
                f"{row['bytes'] / 1e6:.1f}",
            )
        console.print(table)
    console.print(
        f"recall: share of the {rows[0]['k']} best keys found. mass: share of their attention that those found hold.",
        highlight=False,
    )


def _setting(row: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Name and the settings in which rows of one retriever differ."""
    differ = [name for name, value in row["args"].items() if any(other["args"].get(name) != value for other in alike)]
    words = [f"{name}={row['args'][name]}" for name in differ]
    note = "" if row["index_used"] else "(too few keys: searched exactly)"
    return " ".join(part for part in (row["retriever"], *words, note) if part)
