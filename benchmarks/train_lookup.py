"""Trains SmolLM2-135M to look facts up: how the shipped weights ``smollm2-135m-fot`` were made.

    python benchmarks/train_lookup.py OUT --books BOOKS/ --steps 600
    python benchmarks/train_lookup.py OUT --books BOOKS/ --steps 600       # again: goes on from OUT/last.pt

Each step reads four documents of two windows. The first window tells facts between stretches of real text, or a pass
key, or is text; the second asks, in told or in other words, or quotes. Every row sees the first windows of all rows
(FoT paper section 3.2, d = 4) and those of up to ``--kept`` steps before, detached, as more negatives. Trained is the
attention of layers 12 to 21, of which 17, 18, 20 and 21 are memory layers: layers below the first memory layer write
the name into what a key is made of.

A share ``--chat`` of the documents that tell facts are asked through the chat template, as ``lightning ask`` asks.

Two more rows are windows of plain text, of a book and of code, one beside these memories and one beside none. Their
loss is the Kullback-Leibler divergence from what the backbone alone says there, times ``--held``: what keeps the model
what it was. They are drawn anew each step: 72 that came again and again were learned by heart (divergence .04 on
these, .07 on others).
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.data.mixture.facts import RealText, draw_facts, facts_document, recall_document
from lightning_fot.data.mixture.passkey import passkey_document
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.model.passes.crossbatch import CollectPass, CrossbatchPass
from lightning_fot.model.reading.logits import head_of
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.pretrained.delta import write_delta
from lightning_fot.system.files import writing

BACKBONE = "smollm2-135m"
MEMORY = MemoryConfig(memory_layers=[17, 18, 20, 21], window=256, top_k=32, skip_window_start=1)
# How such weights read: a fact on the border of two windows is seen as a whole. Windows that begin with tokens of the
# window before need a sink (docs/LOG.md).
READING = {"overlap": 64, "sink_tokens": 1}
TRAINED = range(12, 22)
ROWS = 4
# Steps whose facts share their relations, so that what is kept from the steps before holds near misses.
TOGETHER = 4
QUOTE_TOKENS = 32
QUOTED, PASSKEYS = 0.12, 0.1
QUOTATION_WEIGHT = 0.4
# How `lightning ask` asks them: one of the forms of training, whose answers end a sentence or a line.
FORM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
STOPS = ["\n", ". "]
# Passages that a question is asked behind.
QUOTES = 2
SAVE_EVERY = 25

Pairs = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Told and asking windows (ROWS, W) int64, which asking tokens count (ROWS, W) bool, and the kind of each row."""

    told: Tensor
    asking: Tensor
    wanted: Tensor
    kinds: list[str]


class Documents:
    """Batches by step: each is a function of the seed and its number."""

    def __init__(self, books: list[str], seed: int, chat: float) -> None:
        self.chat = chat
        self.tokenizer = load_tokenizer(BACKBONE)
        encoder = TextEncoder(self.tokenizer)
        self.seed = seed
        self.books = RealText(books, encoder, "--books", 2000)
        self.code = RealText(None, encoder, "code", 2000)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        window = MEMORY.window
        draw = random.Random(repr((self.seed, step)))
        group = random.Random(repr((self.seed, step // TOGETHER, "group")))
        facts = draw_facts(TOGETHER * ROWS, 24, group.randint(1, 4), group.getrandbits(48))
        rows, kinds = [], []
        for told in facts[step % TOGETHER * ROWS :][:ROWS]:
            kind, seed = draw.random(), draw.getrandbits(31)
            text = self.books if draw.random() < 0.7 else self.code
            if kind < QUOTED:
                kinds.append("quoted")
                rows.append(recall_document(text, self.tokenizer, 2 * window, window, QUOTE_TOKENS, seed))
            elif kind < QUOTED + PASSKEYS:
                kinds.append("passkey")
                rows.append(passkey_document(self.tokenizer, 2 * window, seed))
            elif draw.random() < self.chat:
                kinds.append("chat")
                rows.append(facts_document(told, text, self.tokenizer, 2 * window, window, 1.0, seed, chat=True))
            else:
                kinds.append(draw.choice(("told", "other")))
                other = float(kinds[-1] == "other")
                rows.append(facts_document(told, text, self.tokenizer, 2 * window, window, other, seed))
        ids = torch.from_numpy(np.stack([row for row, _ in rows]).astype(np.int64))
        targets = torch.from_numpy(np.stack([mask for _, mask in rows]))
        return Batch(ids[:, :window], ids[:, window:], targets[:, window:], kinds)


class Training:
    """The model, what it is held to, and where it stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.documents = Documents(args.books, args.seed, args.chat)
        self.lm = attach_memory(load_backbone(args.start), MEMORY)
        self.model = self.lm.model
        self.plain = load_backbone(BACKBONE)
        self.before = {name: weight.detach() for name, weight in self.plain.named_parameters()}
        self.model.requires_grad_(False)
        self.trained = {
            name: weight
            for name, weight in self.model.named_parameters()
            if "self_attn" in name and any(f".layers.{layer}." in name for layer in TRAINED)
        }
        for weight in self.trained.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.kept: deque[Pairs] = deque(maxlen=args.kept)
        self.step = 0
        if self.saved.is_file():
            state = torch.load(self.saved, weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["weights"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def saved(self) -> Path:
        """Weights, optimizer and step."""
        return self.out / "last.pt"

    @torch.no_grad()
    def held(self, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Windows of a book and of code (2, W), and the backbone's logarithms of probabilities there (2, W, V)."""
        ids = torch.tensor([text.stretch(MEMORY.window, draw) for text in (self.documents.books, self.documents.code)])
        return ids, self.plain(ids).logits.log_softmax(-1)

    def shown(self, told: Tensor, draw: random.Random) -> tuple[Pairs, int]:
        """Pairs of the told windows, with graph, and of some kept ones behind them; how many windows that is."""
        collected = CollectPass(self.lm.memory_layers[-1])
        with self.lm.attachment.during(collected):
            self.model(input_ids=told, use_cache=False)
        old = draw.sample(list(self.kept), draw.randint(0, len(self.kept)))
        pairs: Pairs = {}
        for layer, (key, value) in collected.pairs.items():
            keys = torch.cat([key, *(one[layer][0] for one in old)])
            pairs[layer] = keys, torch.cat([value, *(one[layer][1] for one in old)])
        self.kept.append({layer: (k.detach(), v.detach()) for layer, (k, v) in collected.pairs.items()})
        return pairs, ROWS * (1 + len(old))

    def advance(self) -> dict[str, Any]:
        """One step; what it measured."""
        args = self.args
        batch = self.documents.batch(self.step)
        draw = random.Random(repr((args.seed, self.step, "shown")))
        held_ids, held = self.held(draw)
        asking = torch.cat([batch.asking, held_ids])
        # The place before a target predicts it; the first of a window cannot be predicted here.
        places = torch.zeros_like(asking, dtype=torch.bool)
        places[:ROWS, :-1] = batch.wanted[:, 1:]
        places[ROWS:] = True
        pairs, windows = self.shown(batch.told, draw)
        table = [list(range(windows)) for _ in range(ROWS + 2)]
        table[ROWS + draw.randrange(2)] = []
        with self.lm.attachment.during(CrossbatchPass(table, pairs)), head_of(self.model, places):
            logits = self.model(input_ids=asking, use_cache=False).logits[0].float()
        count = int(places[:ROWS].sum())
        target = torch.cat([row[1:][place[:-1]] for row, place in zip(asking[:ROWS], places, strict=False)])
        nats = functional.cross_entropy(logits[:count], target, reduction="none")
        weight = torch.cat(
            [
                torch.full((int(place.sum()),), QUOTATION_WEIGHT if kind == "quoted" else 1.0)
                for kind, place in zip(batch.kinds, places, strict=False)
            ]
        )
        answers = (nats * weight).sum() / weight.sum()
        said = logits[count:].log_softmax(-1)
        apart = functional.kl_div(said, held.flatten(0, 1), log_target=True, reduction="batchmean")
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (self.step + 1) / 15) * max(0.02, 1 - self.step / args.steps)
        self.optimizer.zero_grad()
        (answers + args.held * apart).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "answers": answers.item(), "apart": apart.item(), "kinds": batch.kinds}

    def save(self) -> None:
        """Replaces ``last.pt`` whole."""
        weights = {name: weight.detach() for name, weight in self.trained.items()}
        with writing(self.saved) as fresh:
            torch.save({"step": self.step, "weights": weights, "optimizer": self.optimizer.state_dict()}, fresh)

    def write(self) -> Path:
        """The delta against the backbone, in bfloat16."""
        return write_delta(
            self.out / "delta",
            BACKBONE,
            replace(self.lm.config, **READING),
            {name: self.before[name] for name in self.trained},
            {name: weight.detach() for name, weight in self.trained.items()},
            {
                "steps": self.step,
                "start": self.args.start,
                "seed": self.args.seed,
                "chat_template": FORM,
                "answer_stops": STOPS,
                "quotes": QUOTES,
            },
        )


def main() -> None:
    """Trains, saves every 25 steps, and writes OUT/delta at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--books", nargs="+", required=True, help="text between facts, and text that is held")
    parser.add_argument("--start", default=BACKBONE, help="the backbone, or a delta of it")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--held", type=float, default=3.0, help="weight of the divergence from the backbone")
    parser.add_argument(
        "--chat", type=float, default=0.25, help="share of the fact documents asked through the template"
    )
    parser.add_argument("--kept", type=int, default=3, help="steps before whose first windows are shown too")
    parser.add_argument("--seed", type=int, default=12)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    began, first = time.monotonic(), training.step
    with (args.out / "steps.jsonl").open("a", encoding="utf-8") as log:
        while training.step < args.steps:
            line = training.advance()
            log.write(json.dumps(line) + "\n")
            if training.step % SAVE_EVERY == 0 or training.step == args.steps:
                training.save()
                log.flush()
                left = (time.monotonic() - began) / (training.step - first) * (args.steps - training.step)
                print(json.dumps(line), f"about {left / 60:.0f} min left", flush=True)
    print(training.write())


if __name__ == "__main__":
    main()
