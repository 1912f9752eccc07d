"""Recall and speed of retrievers on keys and queries of a model: always both, always on real ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError
from lightning_fot.retrievers.base import Retriever
from lightning_fot.retrievers.keys.scan import topk_rows
from lightning_fot.retrievers.registry import create_retriever
from lightning_fot.system.digests import TENSORS_KEY, check_zip
from lightning_fot.system.package import shipped

DEFAULT_QUERY_GRIDS: dict[str, list[dict[str, Any]]] = {
    "exact": [{}],
    "faiss_ivf": [{"nprobe": value} for value in (1, 4, 8, 16, 32, 64)],
    "hnsw": [{"ef_search": value} for value in (16, 32, 64, 128, 256)],
    "scann": [{"num_leaves_to_search": value} for value in (1, 4, 8, 16, 32, 64)],
}

# Timed calls of one batch size: enough for a p99, and seconds at most.
_MOST_CALLS = 300
_SEARCHED_AT_ONCE = 512
_QUERY_BLOCK = 64
_HEAD = re.compile(r"L(\d+)h(\d+)")
_WANTED = ("_keys", "_queries", "_positions")
# Bytes of the widest float of torch.
_LARGEST_FLOAT = 8


def measure_retriever(
    spec: RetrieverSpec,
    keys: Tensor,
    queries: Tensor,
    past_queries: Tensor | None = None,
    k: int = 32,
    scale: float | None = None,
    query_grid: list[dict[str, Any]] | None = None,
    repeats: int = 5,
    batch: int | Sequence[int] | None = None,
    softcap: float | None = None,
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
        repeats: Timed passes over the queries, at least 1; as many calls as make a p99 are enough.
        batch: Queries a bank in one call, or several such sizes; None means all.
        softcap: Soft cap of the scores in the softmax; None means none.
        **kwargs: Arguments that win over those in ``spec``, such as ``min_index_size``.

    Returns:
        One row for each setting and batch size: memory_tokens, k, retriever, args, recall (share of the k whose score
        reaches the k-th true score, so ties are no misses), mass_recall (softmax mass of the rows found over that of
        the true top-k), mass (softmax mass of the rows found over all keys), batch, search_ms_p50, search_ms_p95 and
        search_ms_p99 of a call, qps, add_s, build_s, bytes, and index_used (whether an index answered rather than a
        scan).

    Raises:
        SettingError: Shapes do not fit, or a setting is unknown.
    """
    if repeats < 1:
        raise SettingError("repeats", repeats, "must be at least 1", "5 is a good number.")
    sizes = [batch or queries.shape[1]] if batch is None or isinstance(batch, int) else list(batch)
    for size in [batch] if isinstance(batch, int) else sizes:
        if size < 1:
            raise SettingError("batch", size, "must be at least 1", "1 is decoding, 512 a window.")
    built = BuiltRetriever(spec, keys, past_queries, k, **kwargs)
    grid = DEFAULT_QUERY_GRIDS.get(built.name, [{}]) if query_grid is None else query_grid
    truth = Truth(keys, queries, k, scale, softcap)
    rows = []
    for setting in grid or [{}]:
        built.set(setting)
        row = {**built.facts(), **truth.score(built.search(queries)).means()}
        for size in sizes:
            calls = min(_MOST_CALLS, repeats * max(1, queries.shape[1] // size))
            rows.append({**row, "batch": size, **times(built.time(queries, calls, size), keys.shape[0] * size)})
    return rows


def times(seconds: Sequence[float], queries: int) -> dict[str, float]:
    """Fields of a row for calls of ``queries`` queries each, over all banks."""
    p50, p95, p99 = (1e3 * float(np.percentile(seconds, share)) for share in (50, 95, 99))
    return {
        "search_ms_p50": p50,
        "search_ms_p95": p95,
        "search_ms_p99": p99,
        "qps": len(seconds) * queries / sum(seconds),
    }


class BuiltRetriever:
    """A retriever over recorded keys, to be asked with one setting after the other.

    Args:
        spec: Name, ``{"name": name, **arguments}``, class path or factory.
        keys: (banks, n, dim).
        past_queries: (banks, p, dim) that it may learn from.
        k: Neighbours wanted.
        **kwargs: Arguments that win over those in ``spec``.

    Raises:
        SettingError: Shapes do not fit, or an argument is unknown.
    """

    def __init__(self, spec: RetrieverSpec, keys: Tensor, past_queries: Tensor | None, k: int, **kwargs: Any) -> None:
        self.retriever = create_retriever(spec, dim=keys.shape[-1], banks=keys.shape[0], **kwargs)
        self.name = _name(spec, self.retriever)
        self.k = k
        self._spec, self._kwargs = spec, kwargs
        if past_queries is not None:
            self.retriever.observe(past_queries)
        start = perf_counter()
        self.retriever.add(keys)
        self.add_seconds = perf_counter() - start
        start = perf_counter()
        self.retriever.flush()
        self.build_seconds = perf_counter() - start

    def set(self, setting: Mapping[str, Any]) -> None:
        """Changes query settings, such as ``{"ef_search": 64}``."""
        self.retriever.set_query_args(**setting)

    def facts(self) -> dict[str, Any]:
        """Fields of a row that do not depend on the queries."""
        retriever = self.retriever
        return {
            "memory_tokens": int(retriever.lengths.max()),
            "k": self.k,
            "retriever": self.name,
            "args": _args(self._spec, self._kwargs, retriever),
            "add_s": self.add_seconds,
            "build_s": self.build_seconds,
            "bytes": retriever.nbytes,
            "index_used": retriever.exact or bool((retriever.indexed > 0).all()),
        }

    def search(self, queries: Tensor) -> Tensor:
        """Rows (banks, q, k) for queries (banks, q, dim)."""
        parts = [self.retriever.search(part, self.k) for part in torch.split(queries, _SEARCHED_AT_ONCE, dim=1)]
        return torch.cat(parts, dim=1)

    def time(self, queries: Tensor, calls: int, batch: int) -> list[float]:
        """Seconds of calls with ``batch`` queries a bank, after one that is not counted.

        Args:
            queries: (banks, q, dim), asked again and again where they are fewer than that takes.
            calls: How many.
            batch: Queries a bank in one call.
        """
        if queries.shape[1] < batch:
            queries = queries.repeat(1, math.ceil(batch / queries.shape[1]), 1)
        parts = torch.split(queries, batch, dim=1)[: queries.shape[1] // batch]
        self.retriever.search(parts[0], self.k)
        seconds = []
        for number in range(calls):
            start = perf_counter()
            self.retriever.search(parts[number % len(parts)], self.k)
            seconds.append(perf_counter() - start)
        return seconds


def _name(spec: RetrieverSpec, retriever: Retriever) -> str:
    named = spec.get("name") if isinstance(spec, dict) else spec
    return named if isinstance(named, str) else type(retriever).__name__


def _args(spec: RetrieverSpec, kwargs: dict[str, Any], retriever: Retriever) -> dict[str, Any]:
    given = {key: value for key, value in spec.items() if key != "name"} if isinstance(spec, dict) else {}
    return {**given, **kwargs, **{name: getattr(retriever, name) for name in retriever.query_args}}


@dataclass(frozen=True)
class Scores:
    """How good found rows are, by query.

    Args:
        recall: (banks, q) share of the true k that was found; ties are no misses.
        mass_recall: (banks, q) softmax mass of the found rows over that of the true k.
        mass: (banks, q) softmax mass of the found rows over that of all keys.
    """

    recall: Tensor
    mass_recall: Tensor
    mass: Tensor

    def means(self) -> dict[str, float]:
        """Means over banks and queries, by name."""
        return {name: float(getattr(self, name).double().mean()) for name in ("recall", "mass_recall", "mass")}

    def worst_recall(self) -> float:
        """Mean recall of the bank where it is lowest."""
        return float(self.recall.double().mean(dim=1).min())


class Truth:
    """Exact scores that sets of rows are judged by.

    Args:
        keys: (banks, n, dim).
        queries: (banks, q, dim).
        k: Neighbours wanted.
        scale: Factor of the scores in the softmax; None means 1 / sqrt(dim).
        softcap: Soft cap of the scores in the softmax; None means none.
    """

    def __init__(
        self, keys: Tensor, queries: Tensor, k: int, scale: float | None = None, softcap: float | None = None
    ) -> None:
        scale = 1 / math.sqrt(keys.shape[-1]) if scale is None else scale
        self.keys = keys.float()
        self.queries = queries.float()
        self.k = min(k, keys.shape[1])
        self.scale = scale
        self.softcap = softcap
        kth, log_all, log_top = [], [], []
        for bank_keys, bank_queries in zip(self.keys, self.queries, strict=True):
            rows, _ = topk_rows(bank_queries, bank_keys, self.k)
            top = _scores(bank_keys, bank_queries, rows)
            kth.append(top.min(dim=1).values)
            log_top.append(torch.logsumexp(softmax_scores(top, scale, softcap), dim=1))
            log_all.append(
                torch.cat(
                    [
                        torch.logsumexp(softmax_scores((part @ bank_keys.T).double(), scale, softcap), dim=1)
                        for part in torch.split(bank_queries, _QUERY_BLOCK)
                    ]
                )
            )
        self.kth, self.log_all, self.log_top = torch.stack(kth), torch.stack(log_all), torch.stack(log_top)

    def score(self, rows: Tensor) -> Scores:
        """Judges found rows (banks, q, k)."""
        recall, mass_recall, mass = [], [], []
        for bank in range(rows.shape[0]):
            # One found twice counts once.
            once = rows[bank].masked_fill(~first_occurrences(rows[bank]), -1)
            found = _scores(self.keys[bank], self.queries[bank], once)
            # Products in fp32 differ in the last bits from call to call; such a difference is a tie.
            slack = 1e-5 * self.kth[bank].abs().clamp_min(1.0)
            recall.append((found >= (self.kth[bank] - slack).unsqueeze(1)).sum(dim=1).clamp_max(self.k) / self.k)
            log_found = torch.logsumexp(softmax_scores(found, self.scale, self.softcap), dim=1)
            mass_recall.append((log_found - self.log_top[bank]).exp())
            mass.append((log_found - self.log_all[bank]).exp())
        return Scores(torch.stack(recall), torch.stack(mass_recall), torch.stack(mass))


def softmax_scores(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Inner products of any shape as they enter a layer's softmax; one of -inf stays: it is of no pair.

    Args:
        products: Of queries and keys.
        scale: Factor.
        softcap: ``c`` of ``c · tanh(score / c)`` (Gemma 2), or None.

    Example:
        >>> softmax_scores(torch.tensor([8.0, 80.0]), 0.25, 4.0)
        tensor([1.8485, 3.9998])
    """
    scores = products * scale
    if softcap is None:
        return scores
    return (softcap * torch.tanh(scores / softcap)).masked_fill(products == -math.inf, -math.inf)


def first_occurrences(rows: Tensor) -> Tensor:
    """Of found rows (q, k): bool, those that name a pair, each counted the first time it is named."""
    ordered, places = rows.sort(dim=-1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(fresh).scatter(1, places, fresh) & (rows >= 0)


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
            optionally ``<name>_past_queries`` and ``<name>_positions`` (q,), the queries' places in their windows.

    Returns:
        Name -> {"keys", "queries"[, "past_queries"]}, each (banks, n, dim) float32[, "positions": (q,)].

    Raises:
        SettingError: The file is missing, of another kind, or holds no such pair.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingError("qk", str(path), "is not a file", "Give a .npz or .safetensors of keys and queries.")
    if file.suffix == ".npz":
        tensors = _read_npz(file)
    elif file.suffix == ".safetensors":
        from lightning_fot.system.tensor_files import load_tensors

        try:
            tensors = load_tensors(file)
        except (OSError, ValueError) as error:
            raise SettingError("qk", str(path), str(error), "Record the keys again.") from error
    else:
        raise SettingError("qk", str(path), "is of an unknown kind", "Give a .npz or a .safetensors.")
    found: dict[str, dict[str, Tensor]] = {}
    for full, keys in tensors.items():
        name = full.removesuffix("_keys")
        if full == name or f"{name}_queries" not in tensors:
            continue
        entry = {"keys": _three_dims(full, keys), "queries": _three_dims(f"{name}_queries", tensors[f"{name}_queries"])}
        if f"{name}_past_queries" in tensors and tensors[f"{name}_past_queries"].numel():
            entry["past_queries"] = _three_dims(f"{name}_past_queries", tensors[f"{name}_past_queries"])
        if f"{name}_positions" in tensors:
            entry["positions"] = tensors[f"{name}_positions"]
        _check_sizes(name, entry)
        found[name] = entry
    if not found:
        raise SettingError("qk", str(path), "holds no <name>_keys with <name>_queries", "Rename the arrays.")
    return found


def _read_npz(file: Path) -> dict[str, Tensor]:
    """Arrays of numbers of an archive; others that stand beside them are left alone."""
    tensors = {}
    try:
        check_zip(file)
        with np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                # Only the names say what is wanted: an array beside them may be of objects, or of words.
                if not name.endswith(_WANTED):
                    continue
                array = archive[name]
                # What does not begin as an array does is given as it is, in bytes.
                kind = array.dtype.kind if isinstance(array, np.ndarray) else type(array).__name__
                if kind not in "fiub":
                    raise ValueError(f"{name} holds no numbers ({getattr(array, 'dtype', kind)})")
                # torch knows the machine's byte order alone, and no number longer than float64.
                wide = kind == "f" and array.dtype.itemsize > _LARGEST_FLOAT
                native = array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)
                tensors[name] = torch.from_numpy(np.ascontiguousarray(native))
    except (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError) as error:
        raise SettingError("qk", str(file), f"cannot be read ({error})", "Save it again with numpy.savez.") from error
    return tensors


def _three_dims(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() not in (2, 3):
        raise SettingError("qk", name, f"has shape {tuple(tensor.shape)}", "Use (n, dim) or (banks, n, dim).")
    if not tensor.numel():
        raise SettingError("qk", name, f"has shape {tuple(tensor.shape)}, nothing", "Record some.")
    found = (tensor if tensor.dim() == 3 else tensor.unsqueeze(0)).float()
    if not bool(torch.isfinite(found).all()):
        raise SettingError("qk", name, "has values that are no finite float32", "Leave them out, or scale them.")
    return found


def _check_sizes(name: str, entry: Mapping[str, Tensor]) -> None:
    banks, _, dim = entry["keys"].shape
    for kind in ("queries", "past_queries"):
        shape = tuple(entry[kind].shape) if kind in entry else (banks, 0, dim)
        if (shape[0], shape[2]) != (banks, dim):
            raise SettingError(
                "qk", f"{name}_{kind}", f"has shape {shape}, its keys have {banks} banks of {dim}", "Let both be alike."
            )


def load_metadata(path: str | Path) -> dict[str, Any]:
    """What a recording says of itself: ``model``, ``layers``, ``window``, ``scale`` by layer and so on.

    Args:
        path: A file that :func:`load_qk` reads.

    Returns:
        Empty for files that say nothing.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            words = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SettingError("qk", str(path), f"cannot be read ({error})", "Record the keys again.") from error
    words.pop(TENSORS_KEY, None)
    found: dict[str, Any] = {}
    for name, word in words.items():
        try:
            found[name] = json.loads(word)
        except ValueError:
            found[name] = word
    return found


def layer_of(name: str) -> int | None:
    """Layer of a recorded bank's name such as ``L18h0``; None where it does not say."""
    match = _HEAD.fullmatch(name)
    return None if match is None else int(match[1])


def scale_of(name: str, metadata: Mapping[str, Any]) -> float | None:
    """Factor of the scores in the softmax of a recorded bank; None where the file does not say."""
    return _of_layer("scale", name, metadata)


def softcap_of(name: str, metadata: Mapping[str, Any]) -> float | None:
    """Soft cap of the scores in the softmax of a recorded bank; None where there is none, or the file does not say."""
    return _of_layer("softcap", name, metadata)


def _of_layer(field: str, name: str, metadata: Mapping[str, Any]) -> float | None:
    values = metadata.get(field)
    found = values.get(str(layer_of(name))) if isinstance(values, Mapping) else None
    return None if found is None else float(found)


SHIPPED_KEYS = shipped("testing_qk.npz")
