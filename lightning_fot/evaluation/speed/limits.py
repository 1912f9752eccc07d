"""What this machine allows at best, to stand beside what was measured.

A scan of a few queries reads every key once, so that the bandwidth of memory bounds it; for many queries the matrix
product does. Decoding a token reads every weight, and an exact search of the memory layers every key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from lightning_fot.evaluation.speed.timing import synchronise

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

# Larger than most caches: 256 MiB of float32. The best of a few passes, since other work on the machine only slows one.
_ARRAY = 1 << 26
_PASSES = 5
_PRODUCT_QUERIES, _PRODUCT_KEYS, _BLOCK = 512, 16384, 2048
# Of a key in eight bits: a byte a coordinate, and a scale.
_SCALE_BYTES = 2
# Queries of a bank up to which exact search takes eight-bit products where the processor has them: `retrievers.exact`.
_FEW_QUERIES = 8


@dataclass(frozen=True)
class Limit:
    """The least time that something can take.

    Args:
        seconds: That time.
        by: ``bandwidth`` or ``products``.
        amount: Bytes to read, or floating-point operations.
        rate: Of them a second, as measured on this machine.
    """

    seconds: float
    by: str
    amount: int
    rate: float

    def beside(self, measured_s: float) -> dict[str, Any]:
        """Fields of a row that has ``measured_s``: of the bound, how much is reached (1 is all of it)."""
        return {
            "limit_ms": 1e3 * self.seconds,
            "limit_by": self.by,
            "limit_amount": self.amount,
            "limit_rate": self.rate,
            "of_limit": self.seconds / max(measured_s, 1e-12),
        }


def scan_limit(banks: int, keys: int, dim: int, queries: int, key_bytes: int, device: torch.device) -> Limit:
    """The least time of an exact search: reading all keys once, or their products with the queries.

    Args:
        banks: KV heads, each with keys of its own; a group of query heads shares them.
        keys: Keys of each.
        dim: Size of a key.
        queries: Queries of each in one call.
        key_bytes: Bytes of a key as the scan reads it; see :func:`scanned_bytes`.
        device: Where it is done.
    """
    nbytes, flop = banks * keys * key_bytes, 2 * banks * queries * keys * dim
    reading = Limit(nbytes / read_rate(str(device)), "bandwidth", nbytes, read_rate(str(device)))
    if queries <= _FEW_QUERIES:
        return reading
    rate = product_rate(str(device), dim)
    products = Limit(flop / rate, "products", flop, rate)
    return max(reading, products, key=lambda limit: limit.seconds)


def scanned_bytes(dim: int, item_bytes: int, queries: int, device: torch.device) -> int:
    """Bytes of a key that exact search has to read for so many queries of a bank.

    Args:
        dim: Size of a key.
        item_bytes: Bytes of a stored coordinate; 1 has a scale a key besides.
        queries: Queries of the bank in one call.
        device: Where the keys lie.
    """
    from lightning_fot.retrievers.keys.int8_scan import few

    coded = device.type == "cpu" and queries <= few(dim)
    return dim + _SCALE_BYTES if coded or item_bytes == 1 else dim * item_bytes


def decoding_limit(lm: MemoryLM, memory: Memory | None) -> Limit | None:
    """The least time of one token: every weight is read once, and every key of the memory.

    Args:
        lm: The model.
        memory: What is searched exactly; None for no memory.

    Returns:
        None for a mixture of experts, of whose weights a token needs only some.
    """
    config = lm.model.config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    nbytes = sum(parameter.nbytes for parameter in lm.model.parameters())
    table: Any = lm.model.get_input_embeddings()
    if not getattr(config, "tie_word_embeddings", False):
        # One row of it is read.
        nbytes -= table.weight.nbytes
    for number, layer in ({} if memory is None else memory.layers).items():
        fact = lm.attachment.facts[number]
        item = memory.shape.dtype.itemsize if memory is not None else 4
        a_key = scanned_bytes(fact.head_dim, item, fact.heads // fact.kv_heads, lm.device)
        nbytes += sum(layer.lengths) * layer.kv_heads * a_key
    rate = read_rate(str(lm.device))
    return Limit(nbytes / rate, "bandwidth", nbytes, rate)


@lru_cache(maxsize=8)
def read_rate(device: str) -> float:
    """Bytes a second that torch reads from memory, with the threads that it has."""
    place = torch.device(device)
    array = torch.ones(_ARRAY, device=place)
    return array.nbytes / _best(array.sum, place)


@lru_cache(maxsize=8)
def product_rate(device: str, dim: int) -> float:
    """Floating-point operations a second of the products of a scan: (512, dim) by blocks of (dim, 2048) in float32.

    Scores are written over those of the block before, so that they stay in the processor's cache: the fastest form.
    """
    place = torch.device(device)
    left, keys = torch.randn(_PRODUCT_QUERIES, dim, device=place), torch.randn(_PRODUCT_KEYS, dim, device=place)
    scores = torch.empty(_PRODUCT_QUERIES, _BLOCK, device=place)

    def products() -> None:
        for part in torch.split(keys, _BLOCK):
            torch.mm(left, part.T, out=scores)

    return 2 * _PRODUCT_QUERIES * _PRODUCT_KEYS * dim / _best(products, place)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(_PASSES):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
