"""What becomes of the prediction when a full local window moves: three ways to move it, on real text, in one run.

    python benchmarks/window_strides.py            # SmolLM2-135M, minutes on two cores
    python benchmarks/window_strides.py --quick    # random weights, seconds: shows that it works

Texts are read through the cache that generation uses, in chunks between strides: the same as token by token, since a
stride comes at a known place. Each way is compared, token by token, with the plain backbone that has the whole text in
its context, so that easy and hard tokens cancel out.

- ``half a window and sinks``: what ``generate`` does: the first tokens of the text and half of the others stay.
- ``half a window``: the first tokens leave with the rest.
- ``whole window``: the released LongLLaMA: all of it goes into memory at once, and the layers without a memory see a
  single token.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import importlib.util
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.report import Row, table
from torch import Tensor
from torch.nn import functional as F

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.model.lm import MemoryLM
from lightning_fot.model.passes.local_window import MemoryCache
from lightning_fot.model.reading.generation import forward_cached, while_generating
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.system.environment import environment

# The language reference that Python brings with it, and long modules of its library.
MODULES = ("argparse", "inspect", "tarfile", "typing", "zipfile", "subprocess", "smtplib", "optparse")
FIGURE = Path("docs/images/window_strides.png")
EDGE = 8
"""Tokens before and after a stride that are compared."""
COLORS = {"half a window and sinks": "#2257bf", "half a window": "#14806f", "whole window": "#c4501b"}
INK, SOFT, GRID = "#191b1f", "#565c66", "#ecedef"


def ways(config: MemoryConfig) -> dict[str, MemoryConfig]:
    """The three ways to move the window, by name."""
    generating = while_generating(config)
    return {
        "half a window and sinks": generating,
        "half a window": replace(generating, sink_tokens=0, overlap=config.window // 2),
        "whole window": config,
    }


def texts(tokenizer: Any, count: int, length: int) -> Tensor:
    """(count, length) ids: half of the rows prose, half code, all from Python itself."""
    from pydoc_data import topics

    prose = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    prose_ids = tokenizer(prose, add_special_tokens=False)["input_ids"]
    rows = [prose_ids[place * length : (place + 1) * length] for place in range(count - count // 2)]
    for name in MODULES[: count // 2]:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        rows.append(tokenizer(source, add_special_tokens=False)["input_ids"][:length])
    short = [len(row) for row in rows if len(row) < length]
    if short:
        raise SystemExit(f"{len(short)} of the texts have fewer than {length} tokens: lower --length or --texts")
    return torch.tensor(rows)


def nats_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp64: surprise at targets (n,), in nats."""
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def read(lm: MemoryLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Reads ids (1, T); gives nats (T - 1,), and how many tokens before each the window moved (-1: not yet)."""
    cache = MemoryCache(lm.new_memory(), lm.config, lm.model.config.num_hidden_layers)
    nats, since = [], []
    length = ids.shape[1]
    while cache.seen < length:
        start, stop = cache.seen, min(length, cache.seen + cache.room)
        moves = cache.widths[0] == lm.config.window
        logits = forward_cached(lm.model, ids[:, start:stop], cache, stop - start)
        assert logits is not None
        targets = ids[0, start + 1 : stop + 1]
        nats.append(nats_of(logits[0, : len(targets)], targets))
        since.append(torch.arange(len(targets)) if moves else torch.full((len(targets),), -1))
    return torch.cat(nats), torch.cat(since)


def buckets(window: int) -> list[tuple[int, int]]:
    """Tokens since a stride, first and last: 0, 1, 2-3, 4-7 and so on."""
    return [(0, 0)] + [(2**power, min(2 ** (power + 1), window) - 1) for power in range((window - 1).bit_length())]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, nan where there are fewer than two values."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if len(tensor) < 2:
        return float(tensor.mean()), math.nan
    return float(tensor.mean()), float(tensor.std()) / math.sqrt(len(tensor))


def strides_of(since: Tensor) -> list[int]:
    """Places at which the first token after a stride was read."""
    return (since == 0).nonzero()[:, 0].tolist()


def by_distance(way: str, window: int, nats: list[Tensor], plain: list[Tensor], since: list[Tensor]) -> list[Row]:
    """A row for each bucket: mean over strides of nats, and of what they are above the plain backbone's."""
    rows = []
    for first, last in buckets(window):
        own, above = [], []
        for measured, full, distance in zip(nats, plain, since, strict=True):
            for place in strides_of(distance):
                part = slice(place + first, place + last + 1)
                inside = (distance[part] >= first) & (distance[part] <= last)
                if bool(inside.any()):
                    own.append(float(measured[part][inside].mean()))
                    above.append(float((measured[part] - full[part])[inside].mean()))
        if own:
            mean, error = mean_and_error(above)
            label = str(first) if first == last else f"{first}-{last}"
            rows.append(
                {
                    "way": way, "since_stride": label, "first": first, "last": last, "strides": len(own),
                    "nats": mean_and_error(own)[0], "above_full_context": mean, "standard_error": error,
                }
            )  # fmt: skip
    return rows


def around_strides(way: str, nats: list[Tensor], plain: list[Tensor], since: list[Tensor]) -> Row:
    """What the last tokens before and the first after a stride have above the plain backbone, and the difference."""
    before, after, jump = [], [], []
    for measured, full, distance in zip(nats, plain, since, strict=True):
        above = measured - full
        for place in strides_of(distance):
            if place + EDGE <= len(above):
                before.append(float(above[place - EDGE : place].mean()))
                after.append(float(above[place : place + EDGE].mean()))
                jump.append(after[-1] - before[-1])
    mean, error = mean_and_error(jump)
    return {
        "way": way, "strides": len(jump), "before": mean_and_error(before)[0], "after": mean_and_error(after)[0],
        "jump": mean, "standard_error": error,
        "nats_all": float(torch.cat(nats).mean()), "above_all": float((torch.cat(nats) - torch.cat(plain)).mean()),
    }  # fmt: skip


def draw(rows: list[Row], strides: list[Row], title: str, path: Path) -> None:
    """Writes the figure: nats above the plain backbone by tokens since the stride."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(row["since_stride"] for row in sorted(rows, key=lambda row: row["first"])))
    for index, (name, color) in enumerate(COLORS.items()):
        own = [row for row in rows if row["way"] == name]
        x = [labels.index(row["since_stride"]) + 0.05 * (index - 1) for row in own]
        y = [row["above_full_context"] for row in own]
        moved = next(row for row in strides if row["way"] == name)
        axes.errorbar(
            x, y, yerr=[row["standard_error"] for row in own], color=color, marker="o", markersize=5, linewidth=1.8,
            elinewidth=1.1, capsize=2.5, label=f"{name} (all tokens: +{moved['above_all']:.3f})", zorder=3 + index,
        )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("tokens read since the window moved", color=SOFT, fontsize=9.5)
    axes.set_ylabel("nats above the backbone with\nthe whole text in its context", color=SOFT, fontsize=9.5)
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=14)
    box = axes.legend(frameon=False, fontsize=9, labelcolor=SOFT, loc="best", alignment="left")
    box.set_title("what leaves a full window", prop={"size": 9})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Reads the texts in every way, prints the tables and writes figure and numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[18, 20], help="memory layers")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8, help=f"at most {2 * len(MODULES)}")
    parser.add_argument("--length", type=int, default=1536, help="tokens a text")
    parser.add_argument("--figure", type=Path, help=f"{FIGURE} by default; numbers go beside it")
    parser.add_argument(
        "--quick", action="store_true", help="random weights and short texts; a figure only if asked for"
    )
    asked = parser.parse_args()
    if asked.figure is None and not asked.quick:
        asked.figure = FIGURE
    if asked.quick:
        asked.backbone, asked.layers, asked.window, asked.texts, asked.length = "tiny-random-llama", [1, 2], 64, 4, 512
    began = time.perf_counter()
    model = load_backbone(asked.backbone)
    ids = texts(load_tokenizer(asked.backbone), asked.texts, asked.length)
    with torch.no_grad():
        plain = [nats_of(model(input_ids=row[None]).logits[0, :-1], row[1:]) for row in ids]
    print(
        f"[{time.perf_counter() - began:4.0f} s] plain backbone: {float(torch.cat(plain).mean()):.4f} nats", flush=True
    )
    distances, strides = [], []
    base = MemoryConfig(memory_layers=asked.layers, window=asked.window, top_k=asked.top_k)
    for way, config in ways(base).items():
        with attach_memory(model, config) as lm, torch.no_grad():
            measured, since = zip(*(read(lm, row[None]) for row in ids), strict=True)
        distances += by_distance(way, asked.window, list(measured), plain, list(since))
        strides.append(around_strides(way, list(measured), plain, list(since)))
        print(f"[{time.perf_counter() - began:4.0f} s] {way}: {strides[-1]['nats_all']:.4f} nats", flush=True)
    table(
        "Nats by tokens since the window moved; above: than the backbone with the whole text in its context",
        {"way": "moved", "since_stride": "since", "strides": "strides", "nats": "nats", "above_full_context": "above",
         "standard_error": "± s.e."},
        distances,
    )  # fmt: skip
    table(
        f"The {EDGE} tokens before and after a stride: nats above the backbone with the whole text in its context",
        {"way": "moved", "strides": "strides", "before": "before", "after": "after", "jump": "jump",
         "standard_error": "± s.e.", "above_all": "all tokens"},
        strides,
    )  # fmt: skip
    if asked.figure is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
        content = {
            "schema": 1,
            "environment": environment(),
            "settings": settings,
            "seconds": time.perf_counter() - began,
            "plain_nats": float(torch.cat(plain).mean()),
            "by_distance": distances,
            "strides": strides,
        }
        title = f"{asked.backbone}, window {asked.window}: after the window has moved"
        draw(distances, strides, title, asked.figure)
        asked.figure.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{asked.figure} and {asked.figure.with_suffix('.json').name} written")


if __name__ == "__main__":
    main()
