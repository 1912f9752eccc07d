"""What storing a memory in fewer bytes costs: perplexity, logits and bytes for each stored dtype, in one run.

    python benchmarks/storage.py                       # SmolLM2-135M on the sources of Python's standard library
    python benchmarks/storage.py --quick               # seconds, on random weights: a smoke test

Every dtype reads the same documents and is scored on the same tokens behind them, with exact search, so that nothing
but the stored numbers differs. Differences of loss are paired, token by token.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
import platform
import sysconfig
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone, load_tokenizer

DTYPES = ("float32", "bfloat16", "int8")
FILES = ("argparse.py", "ast.py", "doctest.py", "tarfile.py", "typing.py", "zipfile.py")


def documents(backbone: str, count: int, length: int) -> list[Tensor]:
    """Token ids (1, length) of standard-library modules."""
    tokenizer = load_tokenizer(backbone)
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [(folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file()]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in texts]
    long_enough = [one for one in ids if one.shape[1] == length]
    return long_enough[:count]


@torch.no_grad()
def scored(lm: MemoryLM, ids: Tensor, context: int) -> tuple[Tensor, Tensor, int]:
    """Loss of each token behind the context (n,), logits (n, V) and bytes of pairs a token in memory."""
    memory = lm.ingest(ids[:, :context], lm.new_memory())
    stores = [store for layer in memory.layers.values() for store in (layer.key_store, layer.value_store)]
    # Rows in use, without the room that a buffer has to spare.
    stored = sum(
        data.numel() * data.element_size() + (0 if scales is None else 2 * scales.numel())
        for store in stores
        for bank in range(store.banks)
        for data, scales in store.raw(bank)
    )
    logits = lm(ids[:, context:], memory=memory).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, context + 1 :], reduction="none"), logits, stored // len(memory)


def measure(
    backbone: str, layers: list[int], window: int, context: int, targets: int, count: int
) -> list[dict[str, Any]]:
    """One row for each stored dtype, the first being the reference."""
    texts = documents(backbone, count, context + targets)
    model = load_backbone(backbone)
    losses: dict[str, list[Tensor]] = {}
    rows, reference = [], []
    for dtype in (None, *DTYPES):
        name = dtype or "no memory"
        settings: dict[str, Any] = {"memory_layers": layers, "window": window, "top_k": 32, "skip_window_start": 1}
        moved, drift, stored = [], [], 0
        with attach_memory(model, MemoryConfig(**settings, dtype=dtype)) as lm:
            for number, ids in enumerate(texts):
                if dtype is None:
                    with torch.no_grad():
                        logits = lm(ids[:, context:]).logits[0, :-1].float()
                    losses.setdefault(name, []).append(F.cross_entropy(logits, ids[0, context + 1 :], reduction="none"))
                    continue
                loss, logits, stored = scored(lm, ids, context)
                losses.setdefault(name, []).append(loss)
                if dtype == DTYPES[0]:
                    reference.append(logits)
                exact = reference[number]
                moved.append(float((logits - exact).pow(2).mean().sqrt() / exact.std()))
                drift.append(
                    float(
                        F.kl_div(logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
                    )
                )
        every = torch.cat(losses[name])
        row: dict[str, Any] = {"stored": name, "bytes": stored, "perplexity": float(every.mean().exp())}
        if dtype is not None:
            difference = every - torch.cat(losses[DTYPES[0]])
            row |= {
                "nats": float(difference.mean()),
                "error": float(difference.std() / len(difference) ** 0.5),
                "kl": sum(drift) / len(drift),
                "logits": sum(moved) / len(moved),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192, help="tokens in memory")
    parser.add_argument("--targets", type=int, default=1024, help="tokens scored in each document")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny random model, small sizes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        rows = measure("tiny-random-llama", [1, 3], 64, 256, 128, 1)
    else:
        rows = measure(given.backbone, [18, 20], 256, given.context, given.targets, given.documents)
    table = Table(title=f"{platform.processor() or platform.machine()}, torch {torch.__version__}", box=None)
    for title in ("stored as", "bytes a token", "perplexity", "change, nats (± s.e.)", "KL to float32", "logits moved"):
        table.add_column(title, justify="right")
    for row in rows:
        more = ["", "", ""]
        if "nats" in row:
            more = [f"{row['nats']:+.5f} ± {row['error']:.5f}", f"{row['kl']:.2e}", f"{100 * row['logits']:.2f} %"]
        table.add_row(row["stored"], str(row["bytes"] or ""), f"{row['perplexity']:.4f}", *more)
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
