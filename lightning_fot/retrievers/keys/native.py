"""The compiled core of searches, where there is one: the same answers as the torch code beside it, in fewer steps.

Without the library (no compiler when the package was installed, another source, ``LIGHTNING_FOT_NATIVE=0``) everything
works, slower: :func:`library` is None, and callers go on in torch.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint8, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fot.retrievers.keys.codes import Coded, rotation
from lightning_fot.retrievers.keys.compiled import KINDS, digest
from lightning_fot.retrievers.keys.compiled import library as file_of

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_MOST_WANTED = 512  # neighbours: beyond that what is kept of each query is no longer small

Rows = NDArray[np.int64]


class _Keys(Structure):
    _fields_ = (
        ("data", c_void_p), ("stride", c_int64), ("size", c_int64), ("dim", c_int32), ("kind", c_int32),
        ("scales", c_void_p), ("gone", c_void_p), ("known", c_int64),
    )  # fmt: skip


class _Coded(Structure):
    _fields_ = (
        ("codes", c_void_p), ("scales", c_void_p), ("lost", c_void_p), ("norms", c_void_p), ("size", c_int64),
        ("rotation", c_void_p),
    )  # fmt: skip


class _Asked(Structure):
    _fields_ = (("queries", c_void_p), ("count", c_int32), ("k", c_int32), ("threads", c_int32))


class _Found(Structure):
    _fields_ = (("rows", c_void_p), ("scores", c_void_p))


class _Answer(Structure):
    _fields_ = (
        ("rows", c_void_p), ("width", c_int32), ("others_width", c_int32), ("limit", c_int64), ("hidden", c_void_p),
        ("apart", c_void_p), ("others", c_void_p), ("other_scores", c_void_p),
    )  # fmt: skip


def load(path: Path) -> Any:
    """The library in a file, or why it cannot be used (a text)."""
    try:
        found: Any = ctypes.CDLL(str(path))
        found.fot_digest.restype = ctypes.c_char_p
        if found.fot_digest().decode() != digest():
            return "it was made of another source"
        asked, keys, out = POINTER(_Asked), POINTER(_Keys), POINTER(_Found)
        found.fot_sizes.argtypes, found.fot_sizes.restype = (c_void_p, c_int64, c_int32, c_float), c_int32
        found.fot_scan.argtypes, found.fot_scan.restype = (asked, keys, out), None
        found.fot_scan_coded.argtypes = (asked, POINTER(_Coded), keys, c_int64, out, c_void_p)
        found.fot_scan_coded.restype = None
        found.fot_merge.argtypes, found.fot_merge.restype = (asked, POINTER(_Answer), keys, keys, out), c_int32
    except (OSError, AttributeError) as error:
        return str(error)
    return found


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any, str]:
    if os.environ.get("LIGHTNING_FOT_NATIVE", "1") == "0":
        return None, "LIGHTNING_FOT_NATIVE is 0"
    problem = "it is not compiled (python -m lightning_fot.retrievers.keys.compiled does)"
    for kind in KINDS:
        if file_of(kind).is_file() and runs(kind):
            found = load(file_of(kind))
            if not isinstance(found, str):
                return found, ""
            problem = found
    return None, problem


def runs(kind: str) -> bool:
    """Whether this processor runs what is compiled for a kind of processor."""
    return kind == "plain" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def library() -> Any:
    """The library, or None."""
    return _loaded()[0]


def missing() -> str:
    """Why there is no library; empty where there is."""
    return _loaded()[1]


def suits(keys: Tensor, k: int) -> bool:
    """Whether the library takes these keys (n, D) and this many neighbours."""
    if library() is None or not 0 < k <= _MOST_WANTED or not keys.is_cpu or keys.dtype not in _KINDS:
        return False
    size, dim = keys.shape
    return size > 0 and (keys.stride(1) == 1 or dim == 1)


def _keys(keys: Tensor, scales: Tensor | None = None, removed: Tensor | None = None, start: int = 0) -> _Keys:
    size, dim = keys.shape
    known = 0 if removed is None else max(0, min(size, len(removed) - start))
    return _Keys(
        keys.data_ptr(), keys.stride(0), size, dim, _KINDS[keys.dtype],
        None if scales is None else scales.data_ptr(), removed.data_ptr() + start if removed is not None else None,
        known,
    )  # fmt: skip


def _room(count: int, k: int) -> tuple[Tensor, Tensor, _Found]:
    # Said in full: defaults of dtype and device are the caller's, and the library writes what it is told of.
    rows = torch.empty(count, k, dtype=torch.int64, device="cpu")
    scores = torch.empty(count, k, dtype=torch.float32, device="cpu")
    return rows, scores, _Found(rows.data_ptr(), scores.data_ptr())


def _asked(queries: Tensor, k: int) -> _Asked:
    return _Asked(queries.data_ptr(), len(queries), k, torch.get_num_threads())


def sizes(numbers: Tensor, usual: float) -> int:
    """What float32 numbers (..., D), contiguous, are.

    Returns:
        0 where the largest of each row lies between ``1 / usual`` and ``usual``, or is 0; 1 where some does not; 2
        where some number is not finite.
    """
    dim = numbers.shape[-1]
    kind: int = library().fot_sizes(numbers.data_ptr(), numbers.numel() // max(1, dim), dim, usual)
    return kind


def scan(
    queries: Tensor, keys: Tensor, k: int, scales: Tensor | None, removed: Tensor | None, start: int
) -> tuple[Tensor, Tensor]:
    """The best of keys that :func:`suits`, every key scored.

    Args:
        queries: (Q, D) float32 on the CPU, contiguous.
        keys: (n, D) floating, or int8 codes.
        k: Neighbours wanted, at most n.
        scales: (n,) float16, contiguous: what scores of codes are multiplied with.
        removed: (m,) bool on the CPU: rows that do not count, numbered from ``start`` before these.
        start: Number of the first row.

    Returns:
        Rows (Q, k) int64, numbered from these keys' first, -1 where too few count; scores (Q, k) float32, best first.
    """
    rows, scores, found = _room(len(queries), k)
    library().fot_scan(_asked(queries, k), _keys(keys, scales, removed, start), found)
    return rows, scores


def scan_coded(
    queries: Tensor, coded: Coded, keys: Tensor, k: int, most: int, removed: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """The best of keys whose first are coded in eight bits.

    Args:
        queries: (q, D) float32 on the CPU, contiguous.
        coded: The first of the keys.
        keys: (n, D) floating: those that :func:`suits`.
        k: Neighbours wanted.
        most: So many keys are scored exactly at most.
        removed: (r,) bool on the CPU: rows that do not count.

    Returns:
        Rows (q, k) int64, -1 where too few count; scores (q, k) float32, best first; and the numbers of queries that
        are not answered, since too many keys are alike.
    """
    rows, scores, found = _room(len(queries), k)
    answered = (c_uint8 * len(queries))()
    lost, norms = coded.errors
    theirs = _Coded(
        coded.codes.data_ptr(), coded.scales.ctypes.data, lost.ctypes.data, norms.ctypes.data, coded.size,
        rotation(keys.shape[1]).data_ptr(),
    )  # fmt: skip
    library().fot_scan_coded(_asked(queries, k), theirs, _keys(keys, None, removed), most, found, answered)
    return rows, scores, [number for number, done in enumerate(answered) if not done]


class Apart:
    """Rows of a bank that are set apart from its index, as :func:`merge` reads them.

    Args:
        hidden: (n,) True for these rows.
        rows: (h,) int64, the same rows.
        keys: (h, D) float32.
    """

    def __init__(self, hidden: NDArray[np.bool_], rows: Tensor, keys: Tensor) -> None:
        self._held = hidden, rows, keys
        self.flags, self.rows, self.keys = hidden.ctypes.data, rows.data_ptr(), _keys(keys)

    def holds(self, hidden: NDArray[np.bool_], rows: Tensor) -> bool:
        """Whether it was made of these."""
        return self._held[0] is hidden and self._held[1] is rows


def merge(
    queries: Tensor,
    keys: Tensor,
    answer: Rows,
    limit: int,
    k: int,
    apart: Apart,
    others: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, str | None]:
    """What an index answered, checked, and merged with rows set apart and rows found otherwise, by exact scores.

    Args:
        queries: (Q, D) float32 on the CPU, contiguous.
        keys: (n, D) of the bank, those that :func:`suits`.
        answer: (Q, w) int64, contiguous; -1 where there is none.
        limit: Rows of an index are below this, and so many are known to ``apart``.
        k: Rows wanted.
        apart: Rows that do not count where they are in the answer, and are scored beside it.
        others: Rows (Q, e) int64, -1 where there is none, and their scores.

    Returns:
        Rows (Q, k) int64, -1 where there are fewer, best first; and why the answer cannot be used, None when it can.
    """
    count, width = answer.shape
    rows = torch.empty(count, k, dtype=torch.int64, device="cpu")
    more, scores, wide = None, None, 0
    if others is not None:
        more, scores, wide = others[0].contiguous(), others[1].contiguous(), others[0].shape[1]
    given = _Answer(
        answer.__array_interface__["data"][0], width, wide, limit, apart.flags, apart.rows,
        None if more is None else more.data_ptr(), None if scores is None else scores.data_ptr(),
    )  # fmt: skip
    asked = _Asked(queries.data_ptr(), count, k, torch.get_num_threads())
    wrong = library().fot_merge(asked, given, _keys(keys), apart.keys, _Found(rows.data_ptr(), None))
    if wrong == 1:
        return rows, f"the index returned rows outside -1 to {limit - 1}"
    return rows, "the index returned a row twice" if wrong else None
