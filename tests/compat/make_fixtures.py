"""Writes the files of ``tests/compat/fixtures``, and the answers of the code that writes them.

    python -m tests.compat.make_fixtures             write files and answers anew: only for a new format of files
    python -m tests.compat.make_fixtures --answers   keep the files, ask the present code
    python -m tests.compat.make_fixtures --public    write the public names alone

Files that are committed stay as they are: they stand for what users have on their disks, written by the code of the
commit that added them. Whoever changes on purpose what a command says of them runs ``--answers`` and reads the
difference. All draws have seeds: from run to run only dates and times differ, and trained weights in
their last bits (3e-7). The backbone's weights are a file, since other processors draw others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lightning_fot import attach_memory
from lightning_fot.pretrained import load_backbone
from tests.compat import answers, public

FIXTURES = Path(__file__).parent / "fixtures"
ANSWERS = Path(__file__).parent / "answers.json"
# Stands in text files where the folder of the fixtures stood.
PLACE = "@FIXTURES@"
# Logits of different processors differ by a thousandth of this.
CLEAR = 0.01
# Pages and pictures are made from results.json again.
MADE_AGAIN = ("report.html", "*.png", "time_split.csv")

_RETRIEVER = {"name": "hnsw", "M": 8, "ef_construction": 64, "ef_search": 64, "min_index_size": 64, "num_threads": 1}
RUN: dict[str, Any] = {
    "seed_everything": 7,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1_000_000,
        "limit_val_batches": 2,
    },
    "model": {
        "backbone": answers.BACKBONE,
        "memory": {
            "memory_layers": answers.LAYERS,
            "window": 32,
            "top_k": answers.TOP_K,
            "skip_window_start": 1,
            "retriever": _RETRIEVER,
        },
        "crossbatch": {"layout": "packed", "pack": 2, "range": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {"paths": ["text"], "batch_size": 2, "heldout_fraction": 0.5},
    "evaluation": {
        "context_tokens": [128],
        "target_tokens": 64,
        "documents": 1,
        "passkey_tokens": [384],
        "passkey_samples": 1,
        "retrieval_queries": 16,
        "retrieval_repeats": 1,
    },
}
GRID: dict[str, Any] = {
    "sweep": {
        "keys": "keys.safetensors",
        "queries": 32,
        "memory_tokens": [256],
        "top_k": [8],
        "batch": [8],
        "repeats": 1,
        "retrievers": [
            {"name": "hnsw", "M": [4, 8], "num_threads": 1, "query": {"ef_search": [16, 64]}},
            {"name": "faiss_ivf", "num_threads": 1, "query": {"nprobe": [2]}},
        ],
    }
}


def write_backbone(folder: str) -> None:
    """A Llama of 3 layers and 36,000 random weights, with the tokenizer of bytes."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def write_texts(folder: str) -> None:
    """Four books, a file of two notes and a folder of source code."""
    Path(folder, "code").mkdir(parents=True)
    for number in range(4):
        words = (f"word{(number * 7 + place * place) % 97}" for place in range(180 + 20 * number))
        Path(folder, f"book{number}.txt").write_text(" ".join(words), encoding="utf-8")
    notes = [{"text": f"note {number}: " + "the sea was calm. " * (3 + number)} for number in range(2)]
    Path(folder, "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes), encoding="utf-8")
    for name in ("one", "two"):
        Path(folder, "code", f"{name}.py").write_text(f'def {name}():\n    return "{name}"\n', encoding="utf-8")


def write_memories(folder: str) -> None:
    """One of two files, one of two rows that has dropped its oldest pairs, one of bytes."""
    for dtype in answers.DTYPES:
        with attach_memory(load_backbone(answers.BACKBONE), answers.memory_config(dtype, "exact")) as lm:
            rows = 2 if dtype == "bfloat16" else 1
            memory = lm.new_memory(rows)
            lm.ingest(answers.ids(rows, 300, seed=1), memory, document="first.txt")
            memory.save(f"{folder}/{dtype}")
            lm.ingest(answers.ids(rows, 150, seed=2), memory, document="second.txt")
            lm.ingest(answers.ids(rows, 60, seed=3), memory)
            lm.ingest(answers.ids(rows, 40, seed=4), memory, document="first.txt")
            memory.save(f"{folder}/{dtype}")


def write_retrievers(folder: str) -> None:
    """Keys in two banks of different lengths, past queries, rows that were removed."""
    for name in ("hnsw", "faiss_ivf"):
        draw = torch.from_numpy(np.random.default_rng(6).integers(-1000, 1000, (2, 200, 16))) / 500
        retriever = answers.saved_retriever(name)
        retriever.observe(draw[:, :64].float() * 0.5)
        retriever.add(draw.float(), torch.tensor([200, 150]))
        retriever.remove([torch.arange(0, 200, 9), None])
        retriever.save(f"{folder}/{name}")


def write_files() -> None:
    """Everything, in the working directory."""
    write_backbone(answers.BACKBONE)
    write_texts("text")
    write_memories("memories")
    write_retrievers("retrievers")
    model = ["--config=run.yaml", "--model.memory.retriever=exact"]
    Path("run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False), encoding="utf-8")
    Path("grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False), encoding="utf-8")
    answers.command("ingest", "library", "text/book0.txt", "text/code", *model)
    answers.command("ingest", "library", "text/notes.jsonl", "text/book1.txt")
    answers.command("run", "--config=run.yaml", "--run_dir=run")
    gate = ["--model.memory.integration=gate", "--model.trainable=memory_attention", "--trainer.max_steps=3"]
    answers.command("fit", "--config=run.yaml", "--run_dir=gate", *gate)
    lora = ["--model.lora.rank=2", "--trainer.max_steps=3"]
    answers.command("fit", "--config=run.yaml", "--run_dir=lora", *lora)
    answers.command("export", "run", "exported")
    answers.command("export", "run", "delta", "--delta")
    record = ["--tokens=512", "--past=128", "--queries=64", "--data.paths=[text]"]
    answers.command("bench", "--record=keys.safetensors", "--config=run.yaml", *record)
    answers.command("sweep", "--config=grid.yaml", "--run_dir=sweep")


def tidy() -> None:
    """Takes out of the working directory what is made again, and what tells of the machine."""
    for pattern in MADE_AGAIN:
        for file in Path().rglob(pattern):
            file.unlink()
    for file in Path().rglob("*"):
        if file.name == ".lock":
            file.unlink()
    here = str(Path().resolve())
    for file in text_files(Path()):
        text = file.read_text(encoding="utf-8").replace(here, PLACE)
        if file.name == "results.json":
            results = json.loads(text)
            results["environment"].update(platform="Linux", processor="a processor")
            text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
    for file in [Path(), *Path().rglob("*")]:
        file.chmod(0o755 if file.is_dir() else 0o644)


def text_files(folder: Path) -> list[Path]:
    """Those that may name the folder of the fixtures."""
    kinds = (".json", ".yaml", ".csv", ".txt", ".jsonl", ".py")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds)


def copy_fixtures(target: Path) -> Path:
    """The fixtures as they were written, in another folder."""
    shutil.copytree(FIXTURES, target, dirs_exist_ok=True)
    for file in text_files(target):
        text = file.read_text(encoding="utf-8")
        if PLACE in text:
            file.write_text(text.replace(PLACE, str(target.resolve())), encoding="utf-8")
    return target


def collect() -> dict[str, Any]:
    """All answers, each from a fresh copy."""
    asked = {
        "memories": lambda: {
            dtype: {retriever: answers.memory_answer(dtype, retriever) for retriever in answers.RETRIEVERS}
            for dtype in answers.DTYPES
        },
        "retrievers": lambda: {name: answers.retriever_answer(name) for name in ("hnsw", "faiss_ivf")},
        "ask": answers.ask_answer,
        "folders": lambda: {name: answers.folder_answer(name) for name in ("exported", "delta")},
        "keys": answers.keys_answer,
        "sweep": answers.sweep_answer,
        "report": answers.report_answer,
        "resume": lambda: {name: answers.resume_answer(name) for name in ("run", "gate", "lora")},
        "validate": lambda: {name: answers.validate_answer(name) for name in ("run", "gate", "lora")},
        "finish": answers.finish_answer,
    }
    found = {}
    for name, ask in asked.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(copy_fixtures(Path(folder))):
            found[name] = ask()
            if name == "ask":
                assert min(answers.ask_margins()) > CLEAR, "the answer hangs on rounding: choose another question"
    for asked_with in found["memories"].values():
        clear = all(min(step) > CLEAR for step in asked_with["exact"]["margins"])
        assert clear, "the continuation hangs on rounding: choose another prompt"
    return found


def write_answers() -> None:
    """Asks everything; numbers on lines of their own would make a file that nobody reads."""
    text = json.dumps(collect(), indent=1, ensure_ascii=False)
    ANSWERS.write_text(_short_lists(text) + "\n", encoding="utf-8")


def _short_lists(text: str) -> str:
    """Lists of numbers on one line each."""
    numbers = re.compile(r"\[\s*(-?[\d.e+-]+(?:,\s*-?[\d.e+-]+)*)\s*\]")
    return numbers.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)


def main() -> None:
    """Writes files, answers and names, or a part of these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true", help="keep the files")
    parser.add_argument("--public", action="store_true", help="keep files and answers, write the public names alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        if options.public:
            return public.write()
        if not options.answers:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                write_files()
                tidy()
                shutil.rmtree(FIXTURES, ignore_errors=True)
                shutil.copytree(folder, FIXTURES)
        write_answers()
    public.write()


if __name__ == "__main__":
    main()
