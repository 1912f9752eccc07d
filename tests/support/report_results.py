"""Results of a run and a sweep as their files hold them, made up."""

from __future__ import annotations

from typing import Any

EF_SEARCH = (16, 32, 64, 128, 256)


def _perplexity(context: int, memory: str, value: float, gain: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "context_tokens": context,
        "memory": memory,
        "value": value,
        "standard_error": 0.031 * value,
        "tokens": 4096,
        "documents": 2,
        "blocks": 16,
    }
    if gain is not None:
        row |= {"gain_nats": gain, "gain_standard_error": 0.008}
    return row


def _task(context: int, memory: str, correct: int) -> dict[str, Any]:
    return {"task": "passkey", "context_tokens": context, "memory": memory, "accuracy": correct / 6, "n": 6}


def _search(layer: int, retriever: str, args: dict[str, Any], recall: float, qps: float) -> dict[str, Any]:
    ms = 1e3 * 4608 / qps
    return {
        "layer": layer, "memory_tokens": 32768, "k": 32, "batch": 1536, "retriever": retriever,
        "args": args, "recall": recall,
        "mass_recall": 1 - (1 - recall) * 0.6, "mass": 0.62 * (1 - (1 - recall) * 0.6), "search_ms_p50": ms,
        "search_ms_p95": ms * 1.12, "qps": qps, "add_s": 0.0 if retriever == "exact" else 3.412,
        "build_s": 0.0 if retriever == "exact" else 2.187, "bytes": 0 if retriever == "exact" else 40_108_032,
    }  # fmt: skip


def _split(step: str, task: str, memory: str, context: int, tokens: int, *parts: float, **more: Any) -> dict[str, Any]:
    names = ("model_s", "search_s", "insert_s", "build_s")
    return {"step": step, "task": task, "context_tokens": context, "memory": memory, "tokens": tokens,
            "seconds": sum(parts), **dict(zip(names, parts, strict=True)), "beside_s": 0.0, **more}  # fmt: skip


def _bound(measured_ms: float, ms: float, by: str, rate: float) -> dict[str, Any]:
    return {"limit_ms": ms, "limit_by": by, "limit_amount": int(ms * rate / 1e3), "limit_rate": rate,
            "of_limit": ms / measured_ms}  # fmt: skip


FULL: dict[str, Any] = {
    "schema": 1,
    "command": "lightning run --config configs/hnsw.yaml",
    "config": {
        "seed_everything": 1,
        "model": {
            "backbone": "smollm2-135m",
            "memory": {
                "memory_layers": [10, 20],
                "window": 512,
                "top_k": 32,
                "retriever": {"name": "hnsw", "M": 16, "ef_search": 64},
            },
        },
        "data": {"paths": ["books/<script>alert('path')</script>.txt"]},
    },
    "environment": {
        "python": "3.11.9",
        "packages": {"torch": "2.13.0", "lightning": "2.6.6", "hnswlib": "0.8.0"},
        "cpu": "a <b>processor</b> & more",
        "threads": 2,
    },
    "training": {"steps": 60, "tokens": 491_520, "loss_first": 1.913, "loss_last": 1.742, "tokens_per_s": 1180.4},
    "perplexity": [
        *[_perplexity(context, "none", 6.914, None) for context in (1024, 4096, 8192)],
        _perplexity(1024, "hnsw", 6.702, 0.0311),
        _perplexity(4096, "hnsw", 6.521, 0.0585),
        _perplexity(8192, "hnsw", 6.448, 0.0698),
        _perplexity(1024, "exact", 6.699, 0.0316),
        _perplexity(4096, "exact", 6.509, 0.0604),
        _perplexity(8192, "exact", 6.431, 0.0724),
    ],
    "tasks": [
        _task(1024, "none", 0), _task(4096, "none", 0), _task(1024, "hnsw", 4), _task(4096, "hnsw", 2),
        _task(1024, "exact", 4), _task(4096, "exact", 3),
    ],
    "retrieval": [
        _search(layer, "hnsw", {"M": 16, "ef_search": ef}, recall, qps)
        for layer, recalls, speeds in (
            (10, (0.871, 0.942, 0.974, 0.9891, 0.9963), (41_000, 29_500, 18_800, 10_900, 6_100)),
            (20, (0.752, 0.861, 0.928, 0.9662, 0.9857), (36_000, 25_100, 15_900, 9_200, 5_050)),
        )
        for ef, recall, qps in zip(EF_SEARCH, recalls, speeds, strict=True)
    ],
    "exact": [
        {**_search(layer, "exact", {}, 1.0, qps), **_bound(1e3 * 4608 / qps, 200.0, "products", 9e10)}
        for layer, qps in ((10, 6_950), (20, 6_870))
    ],
    "time_split": [
        _split("scoring", "perplexity", "none", 0, 2048, 2.048, 0, 0, 0),
        _split("reading", "perplexity", "hnsw", 4096, 8192, 9, 9, 9, 9),
        _split("reading", "perplexity", "hnsw", 8192, 16384, 8.192, 2.048, 0.1, 4.0, beside_s=1.6384),
        _split("scoring", "perplexity", "hnsw", 8192, 2048, 2.048, 0.4096, 0.01, 0),
        _split("reading", "perplexity", "exact", 8192, 16384, 8.192, 4.096, 0.1, 0),
        _split("scoring", "perplexity", "exact", 8192, 2048, 2.048, 0.8192, 0.01, 0),
        _split("decoding", "decoding", "exact", 8192, 12, 0.48, 0.12, 0, 0),
    ],
    "decoding": [
        {"memory": "none", "memory_tokens": 0, "ms_p50": 38.0, **_bound(38.0, 19.0, "bandwidth", 2.5e10)},
        {"memory": "exact", "memory_tokens": 8192, "ms_p50": 50.0, **_bound(50.0, 20.0, "bandwidth", 2.5e10)},
    ],
    "seconds": {"model_s": 212.4, "search_s": 61.8, "insert_s": 9.2, "build_s": 14.1},
    "something_new": {"ignored": True},
}  # fmt: skip
