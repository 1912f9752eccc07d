"""Recall and speed of retrievers on keys and queries of a model: always both, always on real ones."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.registry import create_retriever
from lightning_fot.retrievers.scan import topk_rows

DEFAULT_QUERY_GRIDS: dict[str, list[dict[str, Any]]] = {
    "exact": [{}],
    "faiss_ivf": [{"nprobe": value} for value in (1, 4, 8, 16, 32, 64)],
    "hnsw": [{"ef_search": value} for value in (16, 32, 64, 128, 256)],
    "scann": [{"num_leaves_to_search": value} for value in (1, 4, 8, 16, 32, 64)],
}

_QUERY_BLOCK = 64


def measure_retriever(
    spec: Any,
    keys: Tensor,
    queries: Tensor,
    past_queries: Tensor | None = None,
    k: int = 32,
    scale: float | None = None,
    query_grid: list[dict[str, Any]] | None = None,
    repeats: int = 5,
    batch: int | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Build a retriever once and measure each of its query settings.

    Args:
        spec: Name, ``{"name": name, **arguments}``, class path or factory.
        keys: (banks, n, dim), any floating dtype.
        queries: (banks, q, dim), rotated as the layer searches with them.
        past_queries: (banks, p, dim) that the retriever may learn from; never those that are measured.
        k: Neighbours wanted.
        scale: Factor of the scores in the softmax; None means 1 / sqrt(dim).
        query_grid: Settings to measure, such as ``[{"ef_search": 64}]``; None takes ``DEFAULT_QUERY_GRIDS``, or the
            retriever as it is when there is none.
        repeats: Timed calls of each batch, at least 1.
        batch: Queries a bank in one call; None means all.
        **kwargs: Arguments that win over those in ``spec``, such as ``min_index_size``.

    Returns:
        One row for each setting: memory_tokens, k, retriever, args, recall (share of the k whose score reaches the
        k-th true score, so ties are no misses), mass_recall (softmax mass of the rows found over that of the true
        top-k), mass (softmax mass of the rows found over all keys), search_ms_p50 and search_ms_p95 of a call, qps,
        add_s, build_s, bytes, and index_used (whether an index answered rather than a scan).

    Raises:
        SettingError: Shapes do not fit, or a setting is unknown.
    """
    if repeats < 1:
        raise SettingError("repeats", repeats, "must be at least 1", "5 is a good number.")
    if batch is not None and batch < 1:
        raise SettingError("batch", batch, "must be at least 1", "1 is decoding, 512 a window.")
    retriever = create_retriever(spec, dim=keys.shape[-1], banks=keys.shape[0], **kwargs)
    name = _name(spec, retriever)
    if past_queries is not None:
        retriever.observe(past_queries)
    start = perf_counter()
    retriever.add(keys)
    add_seconds = perf_counter() - start
    start = perf_counter()
    retriever.flush()
    build_seconds = perf_counter() - start
    grid = DEFAULT_QUERY_GRIDS.get(name, [{}]) if query_grid is None else query_grid
    truth = _Truth(keys, queries, k, 1 / math.sqrt(keys.shape[-1]) if scale is None else scale)
    rows = []
    for setting in grid or [{}]:
        retriever.set_query_args(**setting)
        found, seconds = _timed(retriever, queries, k, repeats, batch or queries.shape[1])
        recall, mass_recall, mass = truth.score(found)
        rows.append(
            {
                "memory_tokens": keys.shape[1],
                "k": k,
                "retriever": name,
                "args": _args(spec, kwargs, retriever),
                "recall": recall,
                "mass_recall": mass_recall,
                "mass": mass,
                "search_ms_p50": 1e3 * float(np.percentile(seconds, 50)),
                "search_ms_p95": 1e3 * float(np.percentile(seconds, 95)),
                "qps": repeats * keys.shape[0] * queries.shape[1] / sum(seconds),
                "add_s": add_seconds,
                "build_s": build_seconds,
                "bytes": retriever.nbytes,
                "index_used": retriever.exact or bool((retriever.indexed > 0).all()),
            }
        )
    return rows


def _name(spec: Any, retriever: Retriever) -> str:
    named = spec.get("name") if isinstance(spec, dict) else spec
    return named if isinstance(named, str) else type(retriever).__name__


def _args(spec: Any, kwargs: dict[str, Any], retriever: Retriever) -> dict[str, Any]:
    given = {key: value for key, value in spec.items() if key != "name"} if isinstance(spec, dict) else {}
    return {**given, **kwargs, **{name: getattr(retriever, name) for name in retriever.query_args}}


def _timed(retriever: Retriever, queries: Tensor, k: int, repeats: int, batch: int) -> tuple[Tensor, list[float]]:
    """Rows found, and the seconds of every call; one call before the clock starts."""
    parts = torch.split(queries, batch, dim=1)
    retriever.search(parts[0], k)
    seconds: list[float] = []
    found: list[Tensor] = []
    for _ in range(repeats):
        found = []
        for part in parts:
            start = perf_counter()
            found.append(retriever.search(part, k))
            seconds.append(perf_counter() - start)
    return torch.cat(found, dim=1), seconds


class _Truth:
    """Exact scores that a set of rows is judged by."""

    def __init__(self, keys: Tensor, queries: Tensor, k: int, scale: float) -> None:
        self.keys = keys.float()
        self.queries = queries.float()
        self.k = min(k, keys.shape[1])
        self.scale = scale
        kth, log_all, log_top = [], [], []
        for bank_keys, bank_queries in zip(self.keys, self.queries, strict=True):
            rows, _ = topk_rows(bank_queries, bank_keys, self.k)
            top = _scores(bank_keys, bank_queries, rows)
            kth.append(top.min(dim=1).values)
            log_top.append(torch.logsumexp(scale * top, dim=1))
            log_all.append(
                torch.cat(
                    [
                        torch.logsumexp(scale * (part @ bank_keys.T).double(), dim=1)
                        for part in torch.split(bank_queries, _QUERY_BLOCK)
                    ]
                )
            )
        self.kth, self.log_all, self.log_top = torch.stack(kth), torch.stack(log_all), torch.stack(log_top)

    def score(self, rows: Tensor) -> tuple[float, float, float]:
        """Recall, mass recall and mass of found rows (banks, q, k), means over banks and queries."""
        recall, mass_recall, mass = [], [], []
        for bank in range(rows.shape[0]):
            found = _scores(self.keys[bank], self.queries[bank], rows[bank])
            # Products in fp32 differ in the last bits from call to call; such a difference is a tie.
            slack = 1e-5 * self.kth[bank].abs().clamp_min(1.0)
            recall.append((found >= (self.kth[bank] - slack).unsqueeze(1)).sum(dim=1).clamp_max(self.k) / self.k)
            log_found = torch.logsumexp(self.scale * found, dim=1)
            mass_recall.append((log_found - self.log_top[bank]).exp())
            mass.append((log_found - self.log_all[bank]).exp())
        return tuple(float(torch.stack(part).double().mean()) for part in (recall, mass_recall, mass))  # type: ignore[return-value]


def _scores(keys: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """Scores (q, k) float64 of rows (q, k); -inf where a row is -1."""
    parts = [
        torch.einsum("qkd,qd->qk", keys[r.clamp_min(0)].double(), q.double()).masked_fill(r < 0, float("-inf"))
        for q, r in zip(torch.split(queries, _QUERY_BLOCK), torch.split(rows, _QUERY_BLOCK), strict=True)
    ]
    return torch.cat(parts)


def load_qk(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read recorded keys and queries.

    Args:
        path: ``.npz`` or ``.safetensors`` with ``<name>_keys`` (n, dim) or (banks, n, dim), ``<name>_queries`` and
            optionally ``<name>_past_queries``.

    Returns:
        Name -> {"keys", "queries"[, "past_queries"]}, each (banks, n, dim) float32.

    Raises:
        SettingError: The file is missing, of another kind, or holds no such pair.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingError("qk", str(path), "is not a file", "Give a .npz or .safetensors of keys and queries.")
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
    elif file.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(file)
    else:
        raise SettingError("qk", str(path), "is of an unknown kind", "Give a .npz or a .safetensors.")
    found: dict[str, dict[str, Tensor]] = {}
    for full, keys in tensors.items():
        name = full.removesuffix("_keys")
        if full == name or f"{name}_queries" not in tensors:
            continue
        entry = {"keys": _three_dims(full, keys), "queries": _three_dims(full, tensors[f"{name}_queries"])}
        if f"{name}_past_queries" in tensors:
            entry["past_queries"] = _three_dims(full, tensors[f"{name}_past_queries"])
        found[name] = entry
    if not found:
        raise SettingError("qk", str(path), "holds no <name>_keys with <name>_queries", "Rename the arrays.")
    return found


def _three_dims(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() not in (2, 3):
        raise SettingError("qk", name, f"has shape {tuple(tensor.shape)}", "Use (n, dim) or (banks, n, dim).")
    return (tensor if tensor.dim() == 3 else tensor.unsqueeze(0)).float()
