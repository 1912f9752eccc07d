"""Exact search on a device against torch's matmul and topk, and against the time it takes to read the keys once.

    python benchmarks/device_scan.py --json scan.json           # 131,072 to 16,777,216 keys a head on a GPU: a minute
    python benchmarks/device_scan.py --device cpu --tiny        # small, on a CPU: shows that it works

Each way is checked against products in float64 of a few thousand keys before it is timed. ``kernels`` are those of
``lightning_fot.kernels``, where Triton is installed and runs (on a CPU only in its interpreter, which is not timed).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_fot.evaluation.speed.timing import time_calls
from lightning_fot.retrievers.keys.scan import Block, topk_blocks

DIM, K = 64, 32


def seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of several calls, each waited for."""
    return statistics.median(time_calls(call, rounds, device))


def ways(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Rows and scores of queries (Q, D) among keys (n, D)."""

    def plain(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        values, rows = (queries.to(keys.dtype) @ keys.T).float().topk(K, dim=1)
        return rows, values

    chosen = {"torch": plain, "ours": lambda queries, keys: topk_blocks(queries, [Block(0, keys)], K)}
    if device.type == "cuda":
        try:
            from lightning_fot.kernels.scan import topk
        except ImportError:
            return chosen
        chosen["kernels"] = lambda queries, keys: topk(queries, keys, K)
    return chosen


def check(way: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype, device: torch.device) -> None:
    """Exact but for rounding.

    Raises:
        RuntimeError: It is not.
    """
    keys, queries = torch.randn(5000, DIM, device=device).to(dtype), torch.randn(7, DIM, device=device)
    exact = queries.double() @ keys.double().T
    rows = way(queries, keys)[0]
    gap = (exact.gather(1, rows).sort(1, descending=True).values - exact.topk(K, dim=1).values).abs().max()
    if float(gap) > (0.3 if dtype != torch.float32 else 1e-3):
        raise RuntimeError(f"not exact: scores differ by {float(gap):.2g}")


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="keep all rows there")
    parser.add_argument("--tiny", action="store_true", help="few keys, few rounds")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    sizes = [8192] if given.tiny else [1 << 17, 1 << 20, 1 << 22, 1 << 24] if device.type == "cuda" else [1 << 17]
    big = torch.zeros((1 << 20) if given.tiny else (1 << 28), device=device)
    read = big.nbytes / seconds(big.sum, device, 5)
    del big
    rows = []
    print(f"{read / 1e9:.0f} GB/s can be read\n| keys | dtype | queries | way | µs | times torch's | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for dtype in dtypes:
        chosen = ways(device)
        for way in chosen.values():
            check(way, dtype, device)
        for size in sizes:
            keys = torch.randn(size, DIM, device=device).to(dtype)
            for count in (1, 8) if given.tiny else (1, 8, 256):
                if count * size > 1 << 31:
                    continue  # torch would hold all scores
                queries = torch.randn(count, DIM, device=device)
                took = {name: seconds(lambda w=way, q=queries, x=keys: w(q, x), device, 3 if given.tiny else 15)
                        for name, way in chosen.items()}  # fmt: skip
                for name, second in took.items():
                    row = {
                        "keys": size, "dtype": str(dtype).removeprefix("torch."), "queries": count, "way": name,
                        "us": 1e6 * second, "times": took["torch"] / second, "of_limit": keys.nbytes / read / second,
                    }  # fmt: skip
                    rows.append(row)
                    print(f"| {size:,} | {row['dtype']} | {count} | {name} | {row['us']:.0f} | {row['times']:.2f} | "
                          f"{row['of_limit']:.2f} |", flush=True)  # fmt: skip
            del keys
            if given.json:
                given.json.write_text(json.dumps({"read_bytes_s": read, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
