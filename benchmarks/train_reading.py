"""Trains a model to read an answer out of its quotes: the second part of how ``smollm2-135m-fot`` was made.

    python benchmarks/train_reading.py OUT --start DELTA_OR_NAME --books BOOKS/ --steps 400
    python benchmarks/train_reading.py OUT --start DELTA_OR_NAME --books BOOKS/ --steps 400   # again: goes on

A question is asked behind the two passages that it attends to most (``lightning_fot.library.quotes``), so what decides
an answer is how these are read. Each row is two passages of 64 tokens, of a note made from a template
(``benchmarks/reading``), of facts between real text, or of two documents, and then all questions that they answer; a
question sees the passages and itself, from the same position on, as when it is asked alone. The loss counts answers.

Trained are factors of low rank (LoRA, arXiv 2106.09685) beside the linear maps of the layers from ``--first`` on. Above
the last memory layer they leave pairs of memories as they are: what was read before can be asked as before.

Windows of plain text, of books and of code, are held to what the backbone alone says there (Kullback-Leibler
divergence, times ``--held``), as in ``train_lookup.py``.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import copy
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.notes import Note, Question, Template, parted, read_templates
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from lightning_fot import MemoryConfig
from lightning_fot.data.mixture.facts import RealText, draw_facts
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.library.quotes import LENGTH
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.pretrained.delta import find_delta, write_delta
from lightning_fot.pretrained.memory_settings import pretrained_settings
from lightning_fot.system.digests import read_sealed
from lightning_fot.system.files import writing

BACKBONE = "smollm2-135m"
TEMPLATES = Path(__file__).parent / "reading"
ASKED = "Question: {}\nAnswer:"  # the chat template of the weights
FACT_ROWS = 0.25  # so that look-ups stay what they are
TWO_DOCUMENTS = 0.5  # how often the second passage is of another document
PLAIN_TOKENS = 256
MOST_QUESTIONS = 5
SAVE_EVERY = 25
MEMORY_LAYERS = (17, 18, 20, 21)
NOTE_TOKENS = 160
QUOTED_ROWS = 0.6
KEPT = 2  # steps before, whose notes are more negatives


class LowRank(nn.Module):
    """A linear map with factors beside it: ``y = W x + B (A x)``.

    Args:
        linear: The map; it is not trained.
        rank: Of the factors.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = self.linear(x) + functional.linear(functional.linear(x, self.a), self.b)
        return y


def add_factors(model: nn.Module, first: int, rank: int) -> dict[str, LowRank]:
    """Puts factors beside all linear maps of the layers from ``first`` on; returns them by the name of the weight."""
    found = {}
    layers: Any = model.get_submodule("model.layers")
    for number in range(first, len(layers)):
        for name, linear in list(layers[number].named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, own = name.rpartition(".")
                found[f"model.layers.{number}.{name}.weight"] = LowRank(linear, rank)
                setattr(layers[number].get_submodule(parent), own, found[f"model.layers.{number}.{name}.weight"])
    return found


@dataclass
class Row:
    """Ids of what is told, (ids, how many of them are the answer) of each question, and how these are asked.

    Args:
        told: Ids.
        asked: Questions.
        quoted: Whether questions see what is told in their window, too, and not in the memory alone.
    """

    told: list[int]
    asked: list[tuple[list[int], int]]
    quoted: bool = True


class Rows:
    """Rows by step: a function of the seed and its number."""

    def __init__(self, templates: list[Template], books: list[str], seed: int) -> None:
        self.templates = templates
        self.seed = seed
        self.tokenizer = load_tokenizer(BACKBONE)
        encoder = TextEncoder(self.tokenizer)
        self.books = RealText(books, encoder, "--books", 2000)
        self.code = RealText(None, encoder, "code", 2000)
        self.between = self.ids("\n")

    def ids(self, text: str) -> list[int]:
        """Ids of a text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def draw(self, step: int, count: int) -> tuple[list[Row], Tensor]:
        """Rows, and a window of plain text (1, ``PLAIN_TOKENS``) int64."""
        draw = random.Random(repr((self.seed, step)))
        rows = []
        for _ in range(count):
            quoted = draw.random() < QUOTED_ROWS
            if draw.random() < FACT_ROWS:
                rows.append(self._facts(draw, quoted))
            else:
                rows.append(self.note(self.templates, draw, quoted))
        text = self.books if step % 2 else self.code
        return rows, torch.tensor([text.stretch(PLAIN_TOKENS, draw)])

    def note(self, templates: list[Template], draw: random.Random, quoted: bool) -> Row:
        """A note of these templates, or two passages of notes that are quoted, and the questions that they answer."""
        while True:
            first = draw.choice(templates).fill(draw)
            if not quoted:
                ids, asked = self._passage(first, draw, NOTE_TOKENS)
                chosen = draw.sample(asked, min(MOST_QUESTIONS, len(asked)))
                return Row(ids, [self._question(question) for question in chosen], quoted)
            second = draw.choice(templates).fill(draw) if draw.random() < TWO_DOCUMENTS else first
            passages, asked = [], []
            for note in (first, second):
                ids, questions = self._passage(note, draw, LENGTH)
                passages.append(ids)
                asked += questions
            if asked:
                break
        if draw.random() < 0.5:
            passages.reverse()
        unique = {question.text: question for question in asked}
        chosen = draw.sample(list(unique.values()), min(MOST_QUESTIONS, len(unique)))
        return Row(
            [*self.between, *passages[0], *self.between, *passages[1], *self.between],
            [self._question(question) for question in chosen],
        )

    def _question(self, question: Question) -> tuple[list[int], int]:
        answer = self.ids(f" {question.answer}\n")
        return self.ids(ASKED.format(question.text)) + answer, len(answer)

    def _passage(self, note: Note, draw: random.Random, length: int) -> tuple[list[int], list[Question]]:
        """A passage around an answer, and the questions whose answers it holds."""
        encoded = self.tokenizer(note.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        wanted = draw.choice(note.questions)
        at = next(number for number, (_, end) in enumerate(places) if end > wanted.start)
        start = max(0, min(at - draw.randint(4, length - 8), len(ids) - length))
        low, high = places[start][0], places[min(start + length, len(ids)) - 1][1]
        # Some words on either side: an answer at the edge has nothing that says of what it is.
        margin = 12
        held = [
            question
            for question in note.questions
            if (low == 0 or question.start - margin >= low) and (high >= len(note.text) - 1 or question.end + 2 <= high)
        ]
        return ids[start : start + length], held

    def _facts(self, draw: random.Random, quoted: bool) -> Row:
        text = self.books if draw.random() < 0.7 else self.code
        facts = draw_facts(1, 4, draw.randint(1, 4), draw.getrandbits(48))[0]
        ids: list[int] = []
        asked = []
        for fact in facts:
            sentence = self.ids(f" {fact.told}{fact.value}{fact.after}")
            if len(sentence) > 40:
                continue
            before = draw.randint(0, LENGTH - len(sentence))
            passage = text.stretch(before, draw) + sentence
            passage += text.stretch(LENGTH - len(passage), draw) if len(passage) < LENGTH else []
            if len(ids) < 2 * LENGTH:
                ids += [*self.between, *passage]
                answer = self.ids(fact.value) + self.ids(fact.after)[:1]
                framed = self.ids(fact.value + "\n")
                for question in (fact.told, fact.asked):
                    asked.append((self.ids(question) + answer, len(answer)))
                    asked.append((self.ids(ASKED.format(question)) + framed, len(framed)))
        return (
            Row([*ids, *self.between], draw.sample(asked, min(MOST_QUESTIONS, len(asked))), quoted)
            if asked
            else self.note(self.templates, draw, quoted)
        )


@dataclass
class Packed:
    """Rows as one batch.

    Args:
        ids: (R, L) int64.
        positions: (R, L) int64; questions that see the memory alone begin at 0, as they do when they are asked.
        local: (R, 1, L, L) bool, what each token sees of its row.
        told: (R, L) bool, whose pairs are the memory.
        asks: (R, L) bool, which tokens attend to the memory.
        answers: (R, L) bool.
    """

    ids: Tensor
    positions: Tensor
    local: Tensor
    told: Tensor
    asks: Tensor
    answers: Tensor


def packed(rows: list[Row], plain: Tensor | None = None, beside: bool = False) -> Packed:
    """Rows, and behind them windows of plain text, which are ``beside`` the memory or not."""
    longest = max(len(row.told) + sum(len(ids) for ids, _ in row.asked) for row in rows)
    count = len(rows) + (0 if plain is None else len(plain))
    longest = max(longest, 0 if plain is None else plain.shape[1])
    ids = torch.zeros(count, longest, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    told, asks, answers = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(3))
    local = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)
    for number, row in enumerate(rows):
        begin = len(row.told)
        ids[number, :begin] = torch.tensor(row.told)
        positions[number, :begin] = torch.arange(begin)
        local[number, :begin, :begin] = torch.ones(begin, begin, dtype=torch.bool).tril()
        # The first token of a window draws attention whatever it says: it is not stored (``skip_window_start``).
        told[number, 1:begin] = True
        asks[number, :begin] = row.quoted
        at, first = begin, begin if row.quoted else 0
        for asked, length in row.asked:
            end = at + len(asked)
            ids[number, at:end] = torch.tensor(asked)
            positions[number, at:end] = torch.arange(first, first + len(asked))
            local[number, at:end, :begin] = row.quoted
            local[number, at:end, at:end] = torch.ones(len(asked), len(asked), dtype=torch.bool).tril()
            answers[number, end - length : end] = True
            asks[number, at:end] = True
            at = end
    if plain is not None:
        length = plain.shape[1]
        ids[len(rows) :, :length] = plain
        positions[len(rows) :, :length] = torch.arange(length)
        local[len(rows) :, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
        asks[len(rows) :, :length] = beside
    return Packed(ids, positions, local[:, None], told, asks, answers)


class Crossbatch:
    """Memory layers in which tokens also attend to what all rows tell (FoT paper section 3.2), and some steps before.

    Keys of a memory stand at position 0, as ``positions: first`` has it.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        self.batch: Packed | None = None
        self.kept: deque[dict[int, tuple[Tensor, Tensor]]] = deque(maxlen=KEPT)
        self.shown: list[dict[int, tuple[Tensor, Tensor]]] = []
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self._rotary: Any = model.get_submodule("model.rotary_emb")
        ALL_ATTENTION_FUNCTIONS["crossbatch"] = self._attend
        for layer in layers:
            attention: Any = model.get_submodule(f"model.layers.{layer}.self_attn")
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation = "crossbatch"

    @contextmanager
    def during(self, batch: Packed, shown: int = 0) -> Iterator[None]:
        """Passes of this batch, beside the memory of so many steps before."""
        self.batch, self._fresh = batch, {}
        self.shown = list(self.kept)[len(self.kept) - min(shown, len(self.kept)) :]
        yield
        self.batch = None

    def keep(self) -> None:
        """Keeps the pairs of the last pass, for steps to come."""
        self.kept.append(self._fresh)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        batch = self.batch
        if batch is not None and mask is not None:
            cos, sin = (part[:, None].to(key.dtype) for part in self._rotary(key, batch.positions))
            turned_back = key * cos - rotate_half(key) * sin
            # (heads, pairs, size)
            keys = turned_back.transpose(0, 1)[:, batch.told]
            values = value.transpose(0, 1)[:, batch.told]
            self._fresh[module.layer_idx] = keys.detach(), values.detach()
            shown = [one[module.layer_idx] for one in self.shown]
            keys = torch.cat([keys, *(one for one, _ in shown)], 1)
            values = torch.cat([values, *(one for _, one in shown)], 1)
            rows = len(query)
            key = torch.cat([key, keys.expand(rows, -1, -1, -1)], 2)
            value = torch.cat([value, values.expand(rows, -1, -1, -1)], 2)
            beside = torch.zeros(batch.asks.shape, dtype=mask.dtype).masked_fill_(
                ~batch.asks, torch.finfo(mask.dtype).min
            )
            mask = torch.cat([mask, beside[:, None, :, None].expand(-1, 1, -1, keys.shape[1])], -1)
        out = functional.scaled_dot_product_attention(
            query, key, value.to(query.dtype), None if mask is None else mask.to(query.dtype), is_causal=mask is None,
            scale=given.get("scaling"), enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


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
