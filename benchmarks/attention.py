"""What a memory costs and what it gains: one command, rivals measured in turns in one run.

    python benchmarks/attention.py                                    # all sections, SmolLM2-135M
    python benchmarks/attention.py --sections b --tokens 131072       # one of them
    python benchmarks/attention.py --quick                            # seconds, on random weights: a smoke test

Sections: a. short input beside an empty memory; b. decoding with a filled memory; c. reading into a memory; d. memory
taken. With ``--json FILE`` the rows of each section are kept, and a later run of other sections adds to the file.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from support.bench import Bench, Fills, Settings
from support.decode import Decoding
from support.ingest import Reading
from support.options import numbers, words
from support.peak import ANSWER, measure_peak, peak_child
from support.report import Report
from support.short import measure_short

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.pretrained import check_backbone
from lightning_fot.retrievers.registry import check_retriever

# Reading and peak memory are measured up to this length: building indexes for longer ones a second time takes minutes.
LONGEST = 131072


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", help="default smollm2-135m")
    parser.add_argument("--sections", type=words, default=tuple("abcd"), help="of a,b,c,d; default all")
    parser.add_argument("--tokens", type=numbers, help="lengths of the memory; default 32768,131072,524288")
    parser.add_argument("--retrievers", type=words, help="default exact,faiss_ivf,hnsw,scann")
    parser.add_argument("--repeats", type=int, help="rounds; section a makes four times as many; default 5")
    parser.add_argument("--threads", type=int, help="threads of every method; default torch's")
    parser.add_argument("--layers", type=numbers, help="memory layers; default 18,20")
    parser.add_argument("--window", type=int, help="local window; default 256")
    parser.add_argument("--top-k", type=int, default=None, help="pairs retrieved; default 32")
    parser.add_argument("--dtype", help="stored dtype of the memory; default the model's")
    parser.add_argument("--real-tokens", type=int, help="tokens of real text whose pairs are recorded; default 16384")
    parser.add_argument("--noise", type=float, default=0.5, help="of stretched keys, share of their cell's spread")
    parser.add_argument("--pairs", type=Path, help="recorded pairs (.safetensors, .npz) instead of reading text")
    parser.add_argument("--save-pairs", type=Path, help="write the recorded pairs there")
    parser.add_argument("--json", type=Path, help="keep all rows there")
    parser.add_argument("--quick", action="store_true", help="tiny random model, small sizes")
    parser.add_argument("--peak-child", nargs=2, help=argparse.SUPPRESS)
    return parser, parser.parse_args()


def settings_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Settings:
    """Arguments checked, with the defaults of a quick or a full run."""
    defaults: dict[str, Any] = {
        "backbone": "tiny-random-llama" if given.quick else "smollm2-135m",
        "tokens": (1024, 2048) if given.quick else (32768, 131072, 524288),
        "retrievers": ("exact", "faiss_ivf") if given.quick else ("exact", "faiss_ivf", "hnsw", "scann"),
        "repeats": 2 if given.quick else 5,
        "threads": torch.get_num_threads(),
        "layers": (1, 3) if given.quick else (18, 20),
        "window": 64 if given.quick else 256,
        "top_k": 16 if given.quick else 32,
        "real_tokens": 512 if given.quick else 16384,
    }
    chosen = {
        name: default if getattr(given, name) is None else getattr(given, name) for name, default in defaults.items()
    }
    for name in ("repeats", "threads", "window", "top_k", "real_tokens"):
        if chosen[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {chosen[name]}: must be at least 1")
    if not set(given.sections) <= set("abcd") or not given.sections:
        parser.error(f"--sections {','.join(given.sections)}: choose of a,b,c,d")
    if min(chosen["tokens"]) < 2 * chosen["top_k"]:
        parser.error(f"--tokens {min(chosen['tokens'])}: give at least twice --top-k")
    if given.pairs is not None and not given.pairs.is_file():
        parser.error(f"--pairs {given.pairs}: there is no such file")
    chosen["tokens"] = tuple(sorted(set(chosen["tokens"])))
    settings = Settings(
        **chosen,
        sections=tuple(given.sections),
        dtype=given.dtype,
        noise=given.noise,
        quick=given.quick,
        pairs=given.pairs,
        save_pairs=given.save_pairs,
    )
    try:
        layers = check_backbone(settings.backbone).num_layers
        for name in settings.retrievers:
            check_retriever(name)
        settings.config().resolve_layers(max(settings.layers) + 1 if layers is None else layers)
    except (SettingError, MissingLibraryError) as error:
        parser.error(str(error))
    return settings


def with_memory(bench: Bench) -> None:
    """Sections b and c, size by size, on the same memories."""
    asked, pairs = bench.settings, bench.pairs
    bench.report.progress(f"memories are filled from {pairs.recorded} recorded pairs a head")
    with bench.attached() as lm:
        empty = Fills(bench, lm, asked.retrievers)
        decoding = Decoding(bench, lm) if "b" in asked.sections else None
        reading = Reading(bench, lm) if "c" in asked.sections else None
        if reading is not None:
            reading.measure(empty, 0)
        del empty
        fills = Fills(bench, lm, asked.retrievers)
        if decoding is not None:
            decoding.bf16_rival(asked.tokens[0])
        for size in asked.tokens:
            if size > LONGEST and decoding is None:
                break
            fills.grow(size)
            if decoding is not None:
                decoding.measure(fills, size)
            if reading is not None and size <= LONGEST:
                reading.measure(fills, size)


@torch.no_grad()
def main() -> None:
    """Measures the sections that were asked for."""
    parser, given = parsed()
    settings = None if given.peak_child else settings_of(parser, given)
    cast(Any, transformers.logging).set_verbosity_error()
    cast(Any, transformers.logging).disable_progress_bar()
    if settings is None:
        method, asked = given.peak_child
        print(ANSWER + json.dumps(peak_child(method, json.loads(asked))))
        return
    torch.set_num_threads(settings.threads)
    report = Report(given.json, settings.as_row())
    report.head()
    for section in settings.sections:
        report.start(section)
    bench = Bench(settings, report)
    if "a" in settings.sections:
        measure_short(bench)
    if {"b", "c"} & set(settings.sections):
        with_memory(bench)
    if "d" in settings.sections:
        if Path("/proc/self/clear_refs").exists():
            measure_peak(bench, tuple(size for size in settings.tokens if size <= LONGEST))
        else:
            report.progress("d: needs /proc of Linux")
    report.progress("done")


if __name__ == "__main__":
    main()
