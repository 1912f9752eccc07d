"""Reading and decoding with a memory in every layer, against the bare backbone on the same windows, in one run.

    python benchmarks/training_free.py                  # SmolLM2-135M, beside 4,096 and 32,768 pairs
    python benchmarks/training_free.py --quick          # random weights, seconds: shows that it works

Three ways read the same windows in turns, each beside a memory of so many random pairs: the bare backbone (no memory
layer, the same windows, overlap and sinks), all layers that attend to the whole memory (``dense_pairs``), and all
layers that search it exactly for ``top_k`` pairs. What is read does not enter the memory, so that each turn does the
same. Printed is each way's best time over the bare backbone's best.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
import time
from pathlib import Path

import torch
from support.report import Row, table

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.memory.memory import Memory
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone
from lightning_fot.system.environment import environment

EVERYTHING = 2**40


def ways(window: int, overlap: int, top_k: int) -> dict[str, MemoryConfig]:
    """Settings by name; the bare backbone comes first."""
    free = MemoryConfig.training_free(window=window, overlap=overlap, top_k=top_k)
    bare = MemoryConfig(memory_layers=[], window=window, overlap=overlap, sink_tokens=free.sink_tokens)
    return {
        "bare backbone": bare,
        "all layers, dense": MemoryConfig.training_free(window=window, overlap=overlap, dense_pairs=EVERYTHING),
        f"all layers, exact search, k = {top_k}": MemoryConfig.training_free(
            window=window, overlap=overlap, top_k=top_k, dense_pairs=0
        ),
    }


def filled(lm: MemoryLM, pairs: int) -> Memory:
    """A memory of random pairs."""
    memory, generator = lm.new_memory(), torch.Generator().manual_seed(0)
    shape = memory.shape
    sizes = zip(shape.layers, shape.kv_heads, shape.head_dim, strict=True)
    drawn = {}
    for layer, heads, dim in sizes:
        keys, values = torch.randn(2, 1, heads, pairs, dim, generator=generator)
        drawn[layer] = keys, values
    if drawn:
        memory.append(drawn)
    return memory


def times(lm: MemoryLM, memory: Memory, windows: int, new: int) -> tuple[float, float]:
    """Seconds to read a token of ``windows`` windows, and to decode one of ``new``."""
    config = lm.config
    length = config.window + (windows - 1) * (config.window - config.overlap - config.sink_tokens)
    ids = torch.arange(length)[None] % lm.vocabulary
    began = time.perf_counter()
    lm(ids, memory=memory, logits_to_keep=1)
    read = (time.perf_counter() - began) / length
    began = time.perf_counter()
    lm.generate(ids[:, :8], memory=memory, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return read, (time.perf_counter() - began) / new


def measure(backbone: str, window: int, overlap: int, top_k: int, sizes: list[int], turns: int, new: int) -> list[Row]:
    """A row for each size and way."""
    model = load_backbone(backbone)
    rows: list[Row] = []
    for pairs in sizes:
        best: dict[str, list[float]] = {}
        for _ in range(turns):
            for name, config in ways(window, overlap, top_k).items():
                with attach_memory(model, config) as lm, torch.no_grad():
                    found = times(lm, filled(lm, pairs), 2, new)
                before = best.setdefault(name, [*found])
                best[name] = [min(old, now) for old, now in zip(before, found, strict=True)]
        bare = best["bare backbone"]
        rows += [
            {
                "pairs": pairs,
                "way": name,
                "read tokens/s": round(1 / read, 1),
                "read, times bare": round(read / bare[0], 2),
                "decoded tokens/s": round(1 / decoded, 1),
                "decoded, times bare": round(decoded / bare[1], 2),
            }
            for name, (read, decoded) in best.items()
        ]
    return rows


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--top_k", type=int, default=128)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 32768], help="sizes of the memory")
    parser.add_argument("--turns", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--new", type=int, default=16, help="tokens that are decoded")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="random weights and small sizes")
    given = parser.parse_args()
    if given.quick:
        rows = measure("tiny-random-llama", 64, 16, 8, [128, 256], 1, 4)
    else:
        rows = measure(given.backbone, given.window, given.overlap, given.top_k, given.pairs, given.turns, given.new)
    table("Beside a memory of so many pairs a head", {name: name for name in rows[0]}, rows)
    if given.json is not None:
        given.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
