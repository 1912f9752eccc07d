"""Section b: exact search against torch's product and topk, and against what the machine could do."""

from __future__ import annotations

import torch
from support.heads import Head, Truth
from support.report import Row, table
from support.subjects import Bench, micros, one_by_one, rows_of, singly, whole
from support.timing import bandwidth, interleave, product_rate, ratio, timed
from torch import Tensor

_COLUMNS = {
    "head": "head",
    "keys": "keys",
    "batch": "batch",
    "us": "µs/query",
    "torch_us": "torch's",
    "ratio": "times faster",
    "ratio_q1": "q1",
    "ratio_q3": "q3",
    "recall": "recall",
    "limit_us": "limit µs",
    "limit": "limit/measured",
    "limit_by": "limited by",
}


def measure_scan(bench: Bench) -> None:
    """One row for each head and batch."""
    asked = bench.asked
    read = bandwidth(asked.quick)
    rows: list[Row] = []
    for head in bench.heads:
        bench.report.progress(f"b: {head.name}, exact search")
        rows += _measured(bench, head, read)
    bench.report.add("b", rows)
    table(
        f"b. Exact search against torch's matmul and topk, float32, k={asked.k}; {read / 1e9:.1f} GB/s can be read",
        _COLUMNS,
        rows,
    )
    print("  limit: batch 1, the keys read once in 8 bits; larger batches, their products in float32, nothing kept\n")


def _measured(bench: Bench, head: Head, read: float) -> list[Row]:
    asked, keys = bench.asked, head.keys
    retriever = bench.filled("exact", head)
    truth = Truth(head, asked.k)
    recall = {size: truth.judge(rows_of(retriever, head, asked.k, size))["recall"] for size in (1, asked.batch)}
    rate = product_rate(asked.batch, *keys.shape)

    def plain(queries: Tensor) -> Tensor:
        return (queries @ keys.T).topk(asked.k, dim=1).indices

    rows: list[Row] = []
    for batch in (1, asked.batch):
        queries = head.batch(asked.batch)
        if batch == 1:
            parts = one_by_one(queries)
            methods = {
                "ours": singly(lambda query: retriever.search(query, asked.k), parts),
                "torch": singly(plain, [part[0] for part in parts]),
            }
            nbytes = keys.numel() + 2 * len(keys)  # a byte a coordinate and a scale of two a key
            limit, by = 1e6 * nbytes / read, "bandwidth"
        else:
            methods = {"ours": whole(retriever, queries, asked.k), "torch": timed(lambda rows=queries[0]: plain(rows))}
            limit, by = 1e6 * 2 * keys.numel() / rate, "products"
        seconds = interleave(methods, asked.repeats)
        us = micros(seconds["ours"], batch)
        rows.append(
            {
                "head": head.name,
                "keys": len(keys),
                "recorded": head.recorded,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "us": us,
                "torch_us": micros(seconds["torch"], batch),
                **ratio(seconds, "torch", "ours").as_dict("ratio"),
                "recall": recall[batch],
                "limit_us": limit,
                "limit": limit / us,
                "limit_by": by,
            }
        )
    return rows
