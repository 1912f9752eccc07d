"""Questions to files that earlier code wrote, asked through public names and the command line alone.

``make_fixtures.py`` keeps the answers of the code that wrote the files; ``test_compat.py`` asks the present code. Every
function expects the folder of fixtures as the working directory, because the files name each other by relative paths.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fot import Memory, MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.bench import load_metadata, load_qk
from lightning_fot.cli import main
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.report import load_results
from lightning_fot.retrievers import Retriever, create_retriever

BACKBONE = "backbone"
LAYERS = [1, 2]
TOP_K = 8
QUESTION = "word5 word9 word3"
# What memories are saved as; each is asked with all retrievers.
DTYPES = ("float32", "bfloat16", "int8")
RETRIEVERS: dict[str, Any] = {
    "exact": "exact",
    "hnsw": {
        "name": "hnsw", "M": 16, "ef_construction": 200, "ef_search": 256, "min_index_size": 64, "num_threads": 1,
    },
    "faiss_ivf": {"name": "faiss_ivf", "nlist": 8, "nprobe": 4, "min_index_size": 64, "num_threads": 1},
}  # fmt: skip


def memory_config(dtype: str, retriever: str) -> MemoryConfig:
    """Of the memories: the second one drops its oldest pairs."""
    return MemoryConfig(
        memory_layers=LAYERS,
        window=32,
        top_k=TOP_K,
        skip_window_start=1,
        dtype=dtype,  # type: ignore[arg-type]
        capacity=256 if dtype == "bfloat16" else None,
        retriever=RETRIEVERS[retriever],
    )


def ids(rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) random ids of bytes."""
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 259, (rows, length)))


def queries(memory: Memory, layer: int) -> Tensor:
    """(banks, 24, D): stored keys of the layer under a fixed disturbance, so that scores are spread as in attention."""
    keys = folded(memory.layers[layer].keys)
    draw = np.random.default_rng(layer)
    taken = torch.from_numpy(draw.integers(0, keys.shape[1], 24))
    noise = torch.from_numpy(draw.integers(-1000, 1000, (keys.shape[0], 24, keys.shape[2]))) / 500
    return keys[:, taken] + noise.float()


def folded(keys: Tensor) -> Tensor:
    """(B, G, n, D) as (banks, n, D) float32."""
    return keys.flatten(0, 1).float()


def memory_answer(dtype: str, retriever: str) -> dict[str, Any]:
    """What a memory on disk holds, what its index finds, and what the model predicts and writes beside it."""
    with attach_memory(load_backbone(BACKBONE), memory_config(dtype, retriever)) as lm, torch.no_grad():
        memory = lm.load_memory(f"memories/{dtype}")
        memory.flush()
        rows = memory.batch_size
        found = {}
        for layer in LAYERS:
            asked = queries(memory, layer)
            found[str(layer)] = memory.layers[layer].retriever.search(asked, TOP_K).tolist()
        logits = lm(ids(rows, 5, seed=11), memory=memory).logits[:, -1]
        written = lm.generate(
            ids(rows, 5, seed=11),
            memory=memory,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return {
            "lengths": memory.lengths.tolist(),
            "tokens_seen": memory.tokens_seen.tolist(),
            "documents": [
                {"row": one.row, "name": one.name, "tokens": one.tokens, "stored": one.stored, "first": one.first}
                for one in memory.documents
            ],
            "read": [memory.log.tokens(one.number, one.first, one.tokens).tolist() for one in memory.documents],
            "keys": {
                str(layer): rounded(folded(memory.layers[layer].keys).sum(dim=2).flatten()[::37]) for layer in LAYERS
            },
            "values": {
                str(layer): rounded(folded(memory.layers[layer].values).sum(dim=2).flatten()[::37]) for layer in LAYERS
            },
            "found": found,
            "indexed": {str(layer): memory.layers[layer].retriever.stats().rebuilds > 0 for layer in LAYERS},
            "logits": rounded(logits[:, ::7].flatten()),
            "generated": written.sequences[:, 5:].tolist(),
            "margins": [rounded(margin(step)) for step in written.logits],
        }


def margin(logits: Tensor) -> Tensor:
    """(B,) how far the likeliest token is ahead of the next one."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def saved_retriever(name: str) -> Retriever:
    """One of two banks, like those that ``Retriever.save`` wrote."""
    return create_retriever(RETRIEVERS[name], dim=16, banks=2)


def retriever_answer(name: str) -> dict[str, Any]:
    """What a retriever finds that was saved with past queries and removed rows."""
    retriever = saved_retriever(name)
    retriever.load(f"retrievers/{name}")
    retriever.flush()
    asked = torch.from_numpy(np.random.default_rng(5).integers(-1000, 1000, (2, 24, 16))) / 500
    found = retriever.search(asked.float(), TOP_K)
    return {"lengths": retriever.lengths.tolist(), "found": found.tolist()}


def rounded(values: Tensor) -> list[float]:
    """Six significant digits: what JSON of readable size needs."""
    return [float(f"{value:.6g}") for value in values.flatten().tolist()]


def command(*words: str) -> str:
    """Standard output of a command that must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    assert code == 0, f"{words}: exit code {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def ask_answer(*settings: str) -> dict[str, Any]:
    """``ask --json``, but for the time it took and the paths, which depend on where the fixtures lie."""
    words = ["--json", "--raw", "--max_new_tokens=6", "--passages=3", "--passage_tokens=16"]
    said: dict[str, Any] = json.loads(command("ask", "library", QUESTION, *words, *settings))
    said["seconds"] = None
    said["model"]["backbone"] = Path(said["model"]["backbone"]).name
    return said


def ask_margins() -> list[float]:
    """How far the tokens of that answer are ahead of the next ones."""
    settings = json.loads(Path("memories/library/library.json").read_text(encoding="utf-8"))["model"]["memory"]
    prompt = torch.tensor([load_tokenizer(BACKBONE)(QUESTION, add_special_tokens=False)["input_ids"]])
    with attach_memory(load_backbone(BACKBONE), MemoryConfig(**settings)) as lm:
        written = lm.generate(
            prompt,
            memory=lm.load_memory("memories/library"),
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [rounded(margin(step))[0] for step in written.logits]


def folder_answer(name: str) -> dict[str, Any]:
    """Settings and logits of an exported model or a delta, beside what its memory layers keep of a long text."""
    with attach_pretrained(name) as lm, torch.no_grad():
        text = torch.tensor([load_tokenizer(name)(Path("text/book0.txt").read_text(encoding="utf-8"))["input_ids"]])
        logits = lm(text[:, :200]).logits[0, [10, 100, 199]]
        config = lm.config
        return {
            "settings": {
                "memory_layers": list(config.memory_layers),
                "window": config.window,
                "top_k": config.top_k,
                "skip_window_start": config.skip_window_start,
                "retriever": config.retriever,
                "integration": config.integration,
            },
            "logits": rounded(logits[:, ::7].flatten()),
        }


def keys_answer() -> dict[str, Any]:
    """What recorded keys and queries are, and how well they are searched."""
    banks = load_qk("keys.safetensors")
    words = ["bench", "keys.safetensors", "--k=8", "--batch=16", "--repeats=1", "--json=-"]
    for name in ("hnsw", "faiss_ivf"):
        words += ["--retriever", json.dumps({**RETRIEVERS[name], "min_index_size": 1})]
    rows = json.loads(command(*words))
    kept = ("keys", "retriever", "k", "args", "query_args", "recall", "index_used")
    return {
        "metadata": load_metadata("keys.safetensors"),
        "shapes": {
            name: {kind: list(tensor.shape) for kind, tensor in sorted(bank.items())} for name, bank in banks.items()
        },
        "sums": {name: float(bank["keys"].double().sum()) for name, bank in banks.items()},
        "columns": sorted({key for row in rows for key in row}),
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
    }


def sweep_answer() -> dict[str, Any]:
    """The plan of a sweep that is done, and its table once more."""
    words = ["sweep", "--config=grid.yaml", "--run_dir=sweep"]
    plan = command(*words, "--plan")
    results = json.loads(command(*words, "--json"))
    return {"plan": plan.splitlines(), "cells": results["sweep"]["cells"], "structure": structure(results)}


def report_answer(folder: str = "run") -> dict[str, Any]:
    """The page of a run as it is read, its headline numbers, and the files that were written."""
    headline = json.loads(command("report", folder, "--json"))
    return {
        "headline": headline,
        "page": page_text(Path(folder) / "report.html"),
        "files": sorted(path.name for path in Path(folder).glob("*.png")),
        "structure": structure(load_results(Path(folder))),
    }


def page_text(page: Path) -> list[str]:
    """What a page says, without its drawings, styles and scripts."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", text, flags=re.DOTALL)
    lines = (" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]+>", "\n", text).splitlines())
    return [line for line in lines if line]


def structure(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of all values of a JSON document; elements of a list have one name, ``[]``."""
    if isinstance(value, dict) and value:
        return sorted({name for key, item in value.items() for name in structure(item, f"{prefix}.{key}".lstrip("."))})
    if isinstance(value, list) and value:
        return sorted({name for item in value for name in structure(item, f"{prefix}[]")})
    return [prefix]


def resume_answer(folder: str = "run") -> dict[str, Any]:
    """Training of a run that goes on for two steps, and what its files say then."""
    words = [f"--config={folder}/config.yaml", f"--run_dir={folder}", "--ckpt_path=last"]
    command("fit", *words, "--trainer.max_steps=5")
    with (Path(folder) / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    training = json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
    return {
        "steps": [int(row["step"]) for row in rows],
        "losses": [float(f"{float(row['train/loss']):.6g}") for row in rows],
        "training": {key: training[key] for key in ("steps", "tokens", "loss_first", "loss_last")},
    }


def validate_answer(folder: str = "run") -> dict[str, float]:
    """Loss and perplexity that a checkpoint has on held-out documents."""
    said = command("validate", f"--config={folder}/config.yaml", f"--run_dir={folder}", "--ckpt_path=last")
    return {name: float(value) for name, value in re.findall(r"(val/\w+): ([\d.]+)", said)}


def finish_answer() -> dict[str, Any]:
    """A finished run that is asked to go on: which results it keeps, measured long ago."""
    command("run", "--config=run.yaml", "--run_dir=run", "--ckpt_path=last")
    results = load_results(Path("run"))
    return {
        "perplexity": [{key: row[key] for key in ("memory", "context_tokens", "nll")} for row in results["perplexity"]],
        "structure": structure(results),
    }
