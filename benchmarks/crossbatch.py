"""What crossbatch training costs: against plain steps, and against keys and values joined for each row.

    python benchmarks/crossbatch.py --json crossbatch.json       # attention alone, and steps of SmolLM2-135M
    python benchmarks/crossbatch.py --sections a --d 8           # one section, one number of shown contexts
    python benchmarks/crossbatch.py --quick                      # seconds, tiny model: shows that it works

Sections: a. time of one layer's attention; b. its memory; c. time of a training step; d. its memory. All forward and
backward. Times are ratios within a turn; memory is what torch allocates, at its highest.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import statistics
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from support.report import Report, Row, table
from support.shown import METHODS, AttentionCase, Sizes, StepCase, attached, clocked, peak_bytes
from support.timing import interleave, ratio

ROWS = ("shared", "concatenated rows")
TIMES = {
    "d": "d",
    "rows": "rows",
    "plain_s": "plain s",
    "shared_s": "shared s",
    "over_plain": "shared / plain",
    "share": "FLOP share",
    "over_share": "of the share",
    "rows_gain": "conc. rows / shared",
    "batch_gain": "conc. batch / shared",
}
MEMORY = {
    "d": "d",
    "plain_mib": "plain",
    "shared_mib": "shared +",
    "rows_mib": "conc. rows +",
    "batch_mib": "conc. batch +",
    "of_rows": "shared / conc. rows",
    "of_batch": "shared / conc. batch",
}
TITLES = {
    "a": "a. Attention of one layer, forward and backward",
    "b": "b. Its memory (MiB): plain, and what others take more",
    "c": "c. Training step",
    "d": "d. Its memory (MiB): plain, and what others take more",
}
SHORT = {"shared": "shared", "concatenated rows": "rows", "concatenated batch": "batch"}
_MIB = 1 << 20


def times(report: Report, section: str, sizes: Sizes, counts: tuple[int, ...]) -> None:
    """Sections a and c."""
    lm = attached(sizes) if section == "c" else None
    rows: list[Row] = []
    for d in counts:
        report.progress(f"{section}: d = {d}")
        case = AttentionCase(sizes, d) if lm is None else StepCase(sizes, d, lm)
        rivals = tuple(METHODS) if lm is None else ROWS
        seconds = interleave(clocked(case, ("plain", *rivals)), sizes.repeats)
        over = ratio(seconds, "shared", "plain")
        row: Row = {
            "d": d,
            "rows": d + 1 if lm is not None else sizes.rows,
            "plain_s": statistics.median(seconds["plain"]),
            "shared_s": statistics.median(seconds["shared"]),
            **over.as_dict("over_plain"),
            "share": case.share(),
            "over_share": over.median / case.share(),
        }
        for rival in rivals[1:]:
            row |= ratio(seconds, rival, "shared").as_dict(f"{SHORT[rival]}_gain")
        rows.append(row)
        report.add(section, [row])
    table(TITLES[section], TIMES, rows)


def memory(report: Report, section: str, sizes: Sizes, counts: tuple[int, ...]) -> None:
    """Sections b and d."""
    lm = attached(sizes) if section == "d" else None
    rivals = tuple(METHODS) if lm is None else ROWS
    rows: list[Row] = []
    for d in counts:
        report.progress(f"{section}: d = {d}")
        case = AttentionCase(sizes, d) if lm is None else StepCase(sizes, d, lm)
        peaks = {method: peak_bytes(case, method) / _MIB for method in ("plain", *rivals)}
        extra = {method: peaks[method] - peaks["plain"] for method in rivals}
        row: Row = {"d": d, "plain_mib": peaks["plain"]}
        row |= {f"{SHORT[name]}_mib": extra[name] for name in rivals}
        row |= {f"of_{SHORT[name]}": extra["shared"] / extra[name] for name in rivals[1:] if extra[name] > 0}
        rows.append(row)
        report.add(section, [row])
    table(TITLES[section], MEMORY, rows)


def numbers(text: str) -> tuple[int, ...]:
    """``"1,2"`` as whole numbers."""
    return tuple(int(part) for part in text.split(","))


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list("abcd"), help="of a,b,c,d")
    parser.add_argument("--d", type=numbers, help="shown contexts, sections a and b")
    parser.add_argument("--step-d", type=numbers, help="shown contexts, sections c and d; d + 1 rows each")
    parser.add_argument("--backbone", help="for sections c and d")
    parser.add_argument("--layers", type=numbers, help="memory layers, sections c and d")
    parser.add_argument("--window", type=int, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows, sections a and b")
    parser.add_argument("--heads", type=int, default=9, help="query heads, sections a and b; SmolLM2 has 9")
    parser.add_argument("--kv-heads", type=int, default=3, help="KV heads; SmolLM2 has 3")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, help="turns that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="keep all rows there")
    parser.add_argument("--quick", action="store_true", help="tiny random model, small sizes")
    return parser, parser.parse_args()


def settings_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Sizes:
    """Arguments checked, with the defaults of a quick or a full run filled in."""
    quick: dict[str, Any] = {
        "backbone": "tiny-random-llama" if given.quick else "smollm2-135m",
        "layers": (1, 3) if given.quick else (18, 20),
        "window": 64 if given.quick else 512,
        "repeats": 2 if given.quick else 5,
        "d": (1, 4) if given.quick else (1, 2, 4, 8, 16, 32),
        "step_d": (2,) if given.quick else (1, 8),
    }
    for name, default in quick.items():
        if getattr(given, name) is None:
            setattr(given, name, default)
    if not given.sections or not set(given.sections) <= set(TITLES):
        parser.error(f"--sections {','.join(given.sections)}: choose of a,b,c,d")
    for name in ("window", "rows", "heads", "kv_heads", "head_dim", "repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)}: must be at least 1")
    if given.heads % given.kv_heads:
        parser.error(f"--heads {given.heads}: must be a multiple of --kv-heads {given.kv_heads}")
    for name in ("d", "step_d"):
        if min(getattr(given, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    return Sizes(**{name: getattr(given, name) for name in Sizes.__dataclass_fields__})


def main() -> None:
    """Measures the sections that were asked for."""
    parser, given = parsed()
    cast(Any, transformers.logging).set_verbosity_error()
    cast(Any, transformers.logging).disable_progress_bar()
    sizes = settings_of(parser, given)
    torch.set_num_threads(sizes.threads)
    report = Report(given.json, {**sizes.as_row(), "d": given.d, "step_d": given.step_d})
    report.head()
    for section in given.sections:
        report.start(section)
        counts = given.d if section in "ab" else given.step_d
        (times if section in "ac" else memory)(report, section, sizes, counts)
    report.progress("done")


if __name__ == "__main__":
    main()
