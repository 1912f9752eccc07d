"""A memory in shards against one in this process: searches with attention, what travels, and reading by workers.

    python benchmarks/sharded.py                    # the shipped recorded keys, repeated to 98,304
    python benchmarks/sharded.py --retriever faiss_ivf --keys 393216
    python benchmarks/sharded.py --book BOOK.txt    # and reading by 1 and 2 workers
    python benchmarks/sharded.py --tiny             # seconds: does it run?

All ratios are of one run, each method in turn within a round, and the median of rounds. Keys beyond the recorded ones
are these with noise of a hundredth of their size, so that none is there twice.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fot.config.memory import ShardSettings
from lightning_fot.memory import Memory, MemoryShape
from lightning_fot.memory.found import Scoring
from lightning_fot.memory.place import InProcess, Place
from lightning_fot.model.attention.softmax import attend
from lightning_fot.shards import asking
from lightning_fot.shards import group as groups
from lightning_fot.shards.place import Sharded
from lightning_fot.system.package import shipped

HEADS = ("L10h0", "L20h1")


def recorded(count: int) -> tuple[Tensor, Tensor]:
    """Keys (1, 2, count, D) and queries (1, 2, 256, D) of two heads of SmolLM2."""
    with np.load(shipped("testing_qk.npz")) as file:
        keys = torch.stack([torch.from_numpy(file[f"{head}_keys"]).float() for head in HEADS])
        queries = torch.stack([torch.from_numpy(file[f"{head}_queries"]).float() for head in HEADS])
    generator = torch.Generator().manual_seed(0)
    copies = -(-count // keys.shape[1])
    many = [keys] + [keys + torch.randn(keys.shape, generator=generator) * keys.std() / 100 for _ in range(copies - 1)]
    return torch.cat(many, 1)[None, :, :count], queries[None]


def filled(place: Place, keys: Tensor, spec: Any, block: int) -> tuple[Memory, float]:
    """A memory of one layer, and the seconds of an append."""
    dim = keys.shape[-1]
    shape = MemoryShape((0,), (keys.shape[1],), (dim,), (dim,), torch.float32, torch.device("cpu"))
    memory = Memory(shape, 1, spec, place=place)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    seconds = []
    for start in range(0, keys.shape[2], block):
        part = slice(start, start + block)
        began = time.perf_counter()
        memory.append({0: (keys[:, :, part], values[:, :, part])})
        seconds.append(time.perf_counter() - began)
    memory.flush()
    return memory, statistics.median(seconds)


def asked(memory: Memory, queries: Tensor, k: int) -> Tensor:
    """What a memory layer does of it: search, and attention beside a local window of one token."""
    scoring = Scoring(queries.shape[-1] ** -0.5)
    outside = memory.layers[0].read(queries, k, 0, scoring)
    local = queries[:, :, :1]
    return attend(
        queries, local, local, outside, scale=scoring.scale, mask=torch.ones(1, 1, queries.shape[2], 1).bool()
    )


def timed(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, all in turn within a round."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            began = time.perf_counter()
            method()
            if number:
                found[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(times) for name, times in found.items()}


def travelling(memory: Memory, ask: Callable[[], Any]) -> int:
    """Bytes of tensors that travel for one read."""
    group = memory.layers[0].group  # type: ignore[attr-defined]
    counted = [0]
    ask_one, answer_one = group.ask, group.answer

    def size(value: Any) -> int:
        if isinstance(value, tuple | list):
            return sum(map(size, value))
        return int(getattr(value, "nbytes", 0))

    def count_asked(*args: Any) -> Any:
        counted[0] += size(args)
        return ask_one(*args)

    def count_answer(call: Any) -> Any:
        found = answer_one(call)
        counted[0] += size(found)
        return found

    group.ask, group.answer = count_asked, count_answer
    try:
        ask()
    finally:
        group.ask, group.answer = ask_one, answer_one
    return counted[0]


def searches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reads of one query, nine and a window, in one process and in shards."""
    keys, queries = recorded(args.keys)
    spec: Any = {"name": args.retriever, "build": "blocking"} if args.retriever != "exact" else "exact"
    memories: dict[str, Memory] = {}
    appends: dict[str, float] = {}
    memories["one process"], appends["one process"] = filled(InProcess(), keys, spec, args.block)
    for count in args.shards:
        name = f"{count} shard{'s' * (count > 1)}"
        memories[name], appends[name] = filled(Sharded(ShardSettings(count)), keys, spec, args.block)
    rows = []
    for number in args.queries:
        some = queries[:, :, torch.arange(number) % queries.shape[2]].contiguous()
        sent = number * len(HEADS) * args.k * keys.shape[-1] * 4
        usual = asking.ONE_CALL_BYTES
        for most, calls in ((usual, "values travel"), (0, "two calls")):
            if sent > most > 0:
                continue
            asking.ONE_CALL_BYTES = most
            asks = {name: partial(asked, memory, some, args.k) for name, memory in memories.items()}
            times = timed(asks, args.rounds)
            for name, ms in times.items():
                row = {"queries": number, "where": name, "calls": calls, "ms": ms, "ratio": ms / times["one process"]}
                row["bytes"] = 0 if name == "one process" else travelling(memories[name], asks[name])
                append, alone = appends[name], appends["one process"]
                rows.append({**row, "append_ms": append * 1000, "append_ratio": append / alone})
        asking.ONE_CALL_BYTES = usual
    return rows


def reading(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of one process that reads document by document, and of workers."""
    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.library.workers import Workers
    from lightning_fot.pretrained import load_tokenizer
    from lightning_fot.request.model import ModelSettings
    from lightning_fot.training.opening import open_model

    memory = {"memory_layers": [-1], "window": 512 if not args.tiny else 16, "top_k": 32}
    settings = ModelSettings(backbone=args.backbone, memory=vars(MemoryConfig(**memory)))
    lm, _ = open_model(settings)
    text = Path(args.book).read_text(encoding="utf-8") if args.book else "words and more words " * 400
    ids = torch.tensor(load_tokenizer(args.backbone)(text, add_special_tokens=False, verbose=False)["input_ids"])
    texts = list(ids[: args.tokens].split(max(1, min(args.tokens, len(ids)) // 8)))
    began = time.perf_counter()
    for one in texts:
        lm.ingest(one[None], lm.new_memory())
    seconds = {"one process": time.perf_counter() - began}
    maker = lm.new_memory().fingerprint
    assert maker is not None
    for count in args.workers:
        several = Workers(count, settings, None, maker())
        began = time.perf_counter()
        for job in [several.begin(one) for one in texts]:
            for _ in several.parts(job, lambda: None):
                pass
        seconds[f"{count} worker{'s' * (count > 1)}"] = time.perf_counter() - began
        several.close()
    tokens = sum(map(len, texts))
    return [
        {"where": name, "tokens_s": tokens / spent, "ratio": seconds["one process"] / spent}
        for name, spent in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=98304)
    parser.add_argument("--retriever", default="exact")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 9, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--book", help="text of the documents that are read")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.keys, args.shards, args.queries, args.rounds, args.workers = 1024, [2], [1, 8], 1, [1]
        args.backbone, args.tokens, args.block = "tiny-random-llama", 256, 256
    torch.set_grad_enabled(False)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.keys:,} keys of 2 heads, {args.retriever}"
    )
    rows = {"searches": searches(args), "reading": reading(args) if args.book or args.tiny else []}
    for row in rows["searches"]:
        print("{queries:>4} queries  {where:<12} {calls:<14} {ms:8.2f} ms  ratio {ratio:6.2f}  {bytes:>10,} bytes  "
              "append {append_ms:6.2f} ms, ratio {append_ratio:6.2f}".format(**row))  # fmt: skip
    for row in rows["reading"]:
        print("{where:<12} {tokens_s:8.0f} tokens/s  ratio {ratio:5.2f}".format(**row))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    groups.close_all()


if __name__ == "__main__":
    main()
