"""What retrievers find, at what speed, on keys of a model: one command, rivals measured in turns in one run.

    python benchmarks/retrievers.py --keys qk.safetensors --json rows.json   # all sections
    python benchmarks/retrievers.py --sections b,c                           # keys that come with the package
    python benchmarks/retrievers.py --quick                                  # seconds, few keys: a smoke test

Sections: a. each retriever against the library behind it; b. exact search against torch, and against the machine's
limits; c. every index and setting: recall, speed against exact search, build, bytes; d. inserting a window; e. as c,
with a million keys a head. With ``--json FILE`` the rows of each section are kept, and a later run of other sections
adds to the file. ``lightning bench --record`` makes a file of keys from any model and text; keys beyond those of the
file are stretched from them (see support/pairs.py), which is said for every head.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
from pathlib import Path
from typing import Any

import torch
from support.heads import Head, read_heads
from support.indexes import measure_indexes
from support.inserts import measure_inserts
from support.options import words
from support.report import Report
from support.scan import measure_scan
from support.subjects import Asked, Bench
from support.wrapper import measure_wrapper

from lightning_fot.bench.measure import SHIPPED_KEYS
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers import available_retrievers, check_retriever

SECTIONS = "abcde"
TOKENS = 122_880


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=Path, default=SHIPPED_KEYS, help="recorded keys; default those of the package")
    parser.add_argument("--sections", type=words, default=tuple(SECTIONS), help="of a,b,c,d,e; default all")
    parser.add_argument("--heads", type=words, default=(), help="names in the file; default all, section e the first")
    parser.add_argument("--retrievers", type=words, help="default every index that can be used")
    parser.add_argument(
        "--tokens", type=int, help=f"keys a head in a to d; default those of the file, {TOKENS:,} without a file"
    )
    parser.add_argument("--large", type=int, help="keys a head in e; default 1048576")
    parser.add_argument("--insert", type=int, help="keys of a window in d; default 2048")
    parser.add_argument("--k", type=int, default=32, help="neighbours wanted; default 32")
    parser.add_argument("--batch", type=int, help="queries of a large call; default 512")
    parser.add_argument("--repeats", type=int, help="rounds; section a makes three times as many; default 7")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default torch's")
    parser.add_argument("--noise", type=float, default=0.5, help="of stretched keys, share of their cell's spread")
    parser.add_argument("--json", type=Path, help="keep all rows there")
    parser.add_argument("--quick", action="store_true", help="few keys, one head")
    return parser, parser.parse_args()


def asked_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Asked:
    """Arguments checked, with the defaults of a quick or a full run."""
    indexes = tuple(name for name, info in available_retrievers().items() if info.importable and name != "exact")
    defaults: dict[str, Any] = {
        "retrievers": indexes,
        "tokens": 4096 if given.quick else TOKENS if given.keys == SHIPPED_KEYS else None,
        "large": 8192 if given.quick else 1 << 20,
        "insert": 256 if given.quick else 2048,
        "batch": 64 if given.quick else 512,
        "repeats": 2 if given.quick else 7,
    }
    chosen = {
        name: default if getattr(given, name) is None else getattr(given, name) for name, default in defaults.items()
    }
    for name in ("tokens", "large", "insert", "batch", "repeats", "threads", "k"):
        value = chosen.get(name, getattr(given, name, None))
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    for name in ("tokens", "large"):
        if chosen[name] is not None and chosen[name] < 4 * given.k:
            parser.error(f"--{name} {chosen[name]}: give at least four times --k")
    if not given.sections or not set(given.sections) <= set(SECTIONS):
        parser.error(f"--sections {','.join(given.sections)}: choose of {','.join(SECTIONS)}")
    try:
        for name in chosen["retrievers"]:
            check_retriever(name)
    except (SettingError, MissingLibraryError) as error:
        parser.error(str(error))
    chosen["retrievers"] = tuple(name for name in chosen["retrievers"] if name != "exact")
    kept = {name: getattr(given, name) for name in ("keys", "sections", "heads", "k", "threads", "noise", "quick")}
    return Asked(**chosen, **kept)


def heads_of(parser: argparse.ArgumentParser, asked: Asked) -> list[Head]:
    """The recorded heads that were asked for."""
    try:
        heads = read_heads(asked.keys, asked.noise, asked.heads)
    except SettingError as error:
        parser.error(f"--keys: {error}")
    except KeyError as error:
        parser.error(f"--heads: the file has no {error.args[0]}")
    return heads[:1] if asked.quick else heads


@torch.no_grad()
def main() -> None:
    """Measures the sections that were asked for."""
    parser, given = parsed()
    asked = asked_of(parser, given)
    torch.set_num_threads(asked.threads)
    report = Report(given.json, asked.as_row())
    heads = heads_of(parser, asked)
    report.head()
    tokens = asked.tokens
    # Section e stretches the recorded heads itself.
    searched = set(asked.sections) - {"e"}
    sized = [head.sized(tokens, number) if tokens and searched else head for number, head in enumerate(heads)]
    bench = Bench(asked, sized, report)
    for head in sized:
        report.progress(head.says())
    for section in asked.sections:
        report.start(section)
    if "a" in asked.sections:
        measure_wrapper(bench)
    if "b" in asked.sections:
        measure_scan(bench)
    if "c" in asked.sections:
        measure_indexes(bench, "c", bench.heads)
    if "d" in asked.sections:
        measure_inserts(bench)
    if "e" in asked.sections:
        named = heads if asked.heads else heads[:1]
        measure_indexes(bench, "e", [head.sized(asked.large, number) for number, head in enumerate(named)])
    report.progress("done")


if __name__ == "__main__":
    main()
