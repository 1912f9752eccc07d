"""Trains a model to read an answer out of its quotes: the second part of how ``smollm2-135m-fot`` was made.

    python benchmarks/train_reading.py OUT --start DELTA_OR_NAME --books BOOKS/ --steps 400
    python benchmarks/train_reading.py OUT --start DELTA_OR_NAME --books BOOKS/ --steps 400   # again: goes on

A question is asked behind the two passages that it is about (``lightning_fot.library.quotes``), so what decides an
answer is how these are read. Each row is two such passages, of notes made from templates (``benchmarks/reading``) or of
facts between real text, and then questions that they answer; or one longer stretch that its questions see in the memory
alone. In the memory layers questions also attend to what all rows tell, and some steps before (crossbatch, FoT section
3.2). The loss counts answers.

Trained are factors of low rank (LoRA, arXiv 2106.09685) beside the linear maps of the layers from ``--first`` on. Those
below the last memory layer change what a memory is made of: it has to be read again.

Windows of plain text, of books and of code, are held to what the backbone alone says there (Kullback-Leibler
divergence, times ``--held``), beside the memory of the batch or none, as in ``train_lookup.py``.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from support.low_rank import add_factors
from support.notes import parted, read_templates
from support.packed import KEPT, Crossbatch, Packed, packed
from support.reading_rows import BACKBONE, Rows
from torch import Tensor, nn
from torch.nn import functional

from lightning_fot import MemoryConfig
from lightning_fot.pretrained import load_backbone
from lightning_fot.pretrained.delta import find_delta, write_delta
from lightning_fot.pretrained.memory_settings import pretrained_settings
from lightning_fot.system.digests import read_sealed
from lightning_fot.system.files import writing

TEMPLATES = Path(__file__).parent / "reading"
SAVE_EVERY = 25
MEMORY_LAYERS = (17, 18, 20, 21)


class Training:
    """The model, what it is held to, and where it stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        trained, self.held_out = parted(read_templates(TEMPLATES), 10)
        self.rows = Rows(trained, args.books, args.seed)
        self.model = load_backbone(args.start)
        self.plain = load_backbone(BACKBONE)
        self.model.requires_grad_(False)
        torch.manual_seed(args.seed)
        if torch.cpu._is_amx_tile_supported():
            for model in (self.model, self.plain):
                for linear in model.modules():
                    if isinstance(linear, nn.Linear):
                        linear.weight.data = linear.weight.data.bfloat16()
        self.factors = add_factors(self.model, args.first, args.rank)
        self.crossbatch = Crossbatch(self.model, MEMORY_LAYERS)
        parameters = [weight for one in self.factors.values() for weight in (one.a, one.b)]
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98))
        self.step = 0
        self.last: Path = args.out / "last.pt"
        goes_on = self.last.exists()
        if goes_on or args.factors:
            saved = torch.load(self.last if goes_on else args.factors)
            if goes_on:
                self.step = saved["step"]
                self.optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                for name, one in self.factors.items():
                    one.a.copy_(saved["factors"][name][0])
                    one.b.copy_(saved["factors"][name][1])

    def save(self) -> None:
        """Replaces the checkpoint whole."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        factors = {name: (one.a.detach(), one.b.detach()) for name, one in self.factors.items()}
        with writing(self.last) as part:
            torch.save({"step": self.step, "optimizer": self.optimizer.state_dict(), "factors": factors}, part)

    def logits(self, batch: Packed, shown: int) -> tuple[Tensor, Tensor]:
        """Logits (N, V) before each token of the answers, and what comes out of the last layer (R, L, D)."""
        body: Any = self.model.get_submodule("model")
        bias = torch.zeros(batch.local.shape).masked_fill_(~batch.local, torch.finfo(torch.float32).min)
        with self.crossbatch.during(batch, shown):
            hidden: Tensor = body(
                input_ids=batch.ids, position_ids=batch.positions, attention_mask=bias, use_cache=False
            ).last_hidden_state
        return self.head(hidden[batch.answers.roll(-1, 1)]), hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (.., V)."""
        head: Any = self.model.get_submodule("lm_head")
        found: Tensor = head(hidden)
        return found.float()

    def write(self) -> Path:
        """The delta against the backbone, in eight bits.

        Weights that the start has changed already are written whole, with their factors in them; others as factors.
        """
        start = find_delta(self.args.start)
        if start is None:
            raise SystemExit(f"--start={self.args.start}: is no delta. Give one, such as smollm2-135m-fot.")
        before = dict(load_backbone(BACKBONE).named_parameters())
        after = {
            name: weight.detach()
            for name, weight in load_backbone(self.args.start).named_parameters()
            if not torch.equal(weight, before[name])
        }
        factors = {name: (one.a.detach(), self.args.scale * one.b.detach()) for name, one in self.factors.items()}
        for name in after:
            if name in factors:
                down, up = factors.pop(name)
                after[name] = after[name] + up @ down
        said = read_sealed(start.settings)
        kept = {name: said[name] for name in ("chat_template", "answer_stops", "quotes") if name in said}
        return write_delta(
            self.args.out / "delta",
            BACKBONE,
            MemoryConfig(**pretrained_settings(self.args.start)),
            before,
            after,
            {"steps": self.step, "start": self.args.start, "seed": self.args.seed, "scale": self.args.scale, **kept},
            factors,
            eight_bits=True,
        )

    def precision(self) -> torch.autocast:
        """bfloat16 for products where the processor multiplies such numbers itself (AMX): two to five times faster."""
        return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())

    def divergence(self, hidden: Tensor, plain: Tensor) -> Tensor:
        """From the backbone alone, a token."""
        with torch.no_grad():
            wanted = self.plain(plain, use_cache=False).logits.float().log_softmax(-1)
        found = self.head(hidden[-len(plain) :, : plain.shape[1]]).log_softmax(-1)
        return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()

    def train(self) -> None:
        """Steps to the last one."""
        args = self.args
        began, losses, held = time.monotonic(), [], []
        while self.step < args.steps:
            rate = args.lr * min(1.0, (self.step + 1) / 20) * max(0.05, 1 - self.step / args.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            rows, plain = self.rows.draw(self.step, args.rows)
            draw = random.Random(repr((args.seed, self.step, "shown")))
            batch = packed(rows, plain, draw.random() < 0.5)
            with self.precision():
                logits, hidden = self.logits(batch, draw.randint(0, KEPT))
                divergence = self.divergence(hidden, plain)
            self.crossbatch.keep()
            loss = functional.cross_entropy(logits, batch.ids[batch.answers])
            (loss + args.held * divergence).backward()
            losses.append(loss.item())
            held.append(divergence.item())
            nn.utils.clip_grad_norm_([w for group in self.optimizer.param_groups for w in group["params"]], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % SAVE_EVERY == 0 or self.step == args.steps:
                self.save()
                seconds = (time.monotonic() - began) / len(losses)
                last = slice(-SAVE_EVERY, None)
                print(
                    f"step {self.step}: loss {sum(losses[last]) / len(losses[last]):.3f}, "
                    f"divergence {sum(held[last]) / len(held[last]):.4f}, {seconds:.1f} s a step, "
                    f"right of held-out notes: {self.right(True):.3f} quoted, {self.right(False):.3f} from the memory",
                    flush=True,
                )

    @torch.no_grad()
    def right(self, quoted: bool) -> float:
        """Share of answers on notes of held-out templates of which each token is the likeliest."""
        draw = random.Random(1)
        right = count = 0
        for _ in range(0, self.args.asked, self.args.rows):
            batch = packed([self.rows.note(self.held_out, draw, quoted) for _ in range(self.args.rows)])
            with self.precision():
                logits, _ = self.logits(batch, KEPT)
            ends = (batch.answers & ~batch.answers.roll(-1, 1))[batch.answers]
            so_far = True
            for one, end in zip((logits.argmax(-1) == batch.ids[batch.answers]).tolist(), ends.tolist(), strict=True):
                so_far = so_far and one
                if end:
                    right, count, so_far = right + so_far, count + 1, True
        return right / count


def main() -> None:
    """Reads the arguments, trains, and says how it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", default="smollm2-135m-fot")
    parser.add_argument("--factors", type=Path, help="a checkpoint of such a training to begin from")
    parser.add_argument("--books", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--first", type=int, default=8, help="the first layer that is trained")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held", type=float, default=1.0)
    parser.add_argument(
        "--scale", type=float, default=0.7, help="how much of what was learned is written (docs/LOG.md)"
    )
    parser.add_argument("--asked", type=int, default=48, help="rows of held-out notes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = Training(args)
    training.train()
    print(training.write())


if __name__ == "__main__":
    main()
