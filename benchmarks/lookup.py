"""Facts told once each in the text of a book, asked for in the words they were told in and in other words.

    python benchmarks/lookup.py BOOK.txt            # the shipped weights, 24 facts in 4,096 tokens
    python benchmarks/lookup.py BOOK.txt --backbone smollm2-135m --layers 18,20  # untrained
    python benchmarks/lookup.py BOOK.txt --backbone smollm2-135m --free top_k=32 dense_pairs=0  # all layers, untrained
    python benchmarks/lookup.py BOOK.txt --quotes 2  # passages that a question attends to are read again before it
    python benchmarks/lookup.py BOOK.txt --plain    # everything in the backbone's own context
    python benchmarks/lookup.py BOOK.txt --heads    # found, weighed: where the memory layers looked
    python benchmarks/lookup.py BOOK.txt --tokens 65536 --retriever hnsw --log lookups.jsonl
    python benchmarks/lookup.py --figure lookups.png --log lookups.jsonl        # of all that is in the log

Neighbouring facts share their sentence and differ in the name alone, so that a model which cannot tell them apart gives
one answer to all: distinct wrong answers are counted. Right is an answer all of whose tokens are the most likely ones.
Facts and texts are those of the task ``evaluation.lookup``, which measures the same in a run; here the layers can be
looked into as well. Times are processor time of one thread, which other jobs of the machine change least.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import copy
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fot import MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.config.tasks import MOST_FACTS
from lightning_fot.evaluation.measures.passkey import wilson
from lightning_fot.evaluation.tasks.parts.facts import Fact, make_facts, sentences_of, text_with
from lightning_fot.library.answering import quoted, quoting_of
from lightning_fot.library.quotes import NEUTRAL
from lightning_fot.model.passes.recorder import Recorder
from lightning_fot.pretrained import load_backbone, load_tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def read(value: str) -> Any:
    """A setting as JSON has it, or the word itself."""
    try:
        return json.loads(value)
    except ValueError:
        return value


PLAIN, FREE = "SmolLM2, all in its context", "SmolLM2, a memory in all layers"


class Weights:
    """Notes where queries of memory layers looked: duck-typed as the trace of a :class:`Recorder`."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, weights: Tensor, rows: Tensor | None = None, **_: Any) -> None:
        """Weights (1, G, R·T, K) and the pairs' numbers."""
        assert rows is not None
        self.seen[layer] = weights[0], rows[0]


def places_of(fact: Fact, text: str, tokenizer: Any, stored: dict[int, int]) -> list[int]:
    """Numbers in memory of the pairs of the answer's tokens, -1 for those that are not stored.

    Args:
        fact: Whose answer.
        text: What was read.
        tokenizer: That read it.
        stored: Numbers of pairs by their token's position in the text.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    start = text.index(fact.statement) + len(fact.told)
    stop = start + len(fact.answer)
    tokens = [number for number, (low, high) in enumerate(offsets) if low < stop and high > start]
    return [stored.get(token, -1) for token in tokens]


class Subject:
    """What is asked: logits of the answer's tokens after a question."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(args.backbone)
        self.plain = args.plain
        layers = [int(layer) for layer in args.layers.split(",")] if args.layers else None
        if self.plain:
            self.model = load_backbone(args.backbone)
        elif args.free is not None:
            changes = {name: read(value) for name, _, value in (word.partition("=") for word in args.free)}
            self.lm = attach_memory(load_backbone(args.backbone), MemoryConfig.training_free(**changes))
        elif layers is not None:
            config = MemoryConfig(
                memory_layers=layers,
                window=args.window,
                top_k=args.top_k or 32,
                skip_window_start=1,
                score_factor=args.score_factor,
            )
            self.lm = attach_memory(load_backbone(args.backbone), config)
        else:
            changes = {"top_k": args.top_k} if args.top_k else {}
            self.lm = attach_pretrained(
                args.backbone, retriever=args.retriever, score_factor=args.score_factor, **changes
            )
        self.begin = "\n" if args.newline else ""
        self.quotes = 0 if self.plain else args.quotes

    @torch.no_grad()
    def read(self, text: str) -> None:
        """Reads the text into the context, or into a memory."""
        ids = torch.tensor([ids_of(self.tokenizer, text)])
        if not self.plain:
            self.memory = self.lm.ingest(ids, self.lm.new_memory())
            _, positions = self.memory.log.locate(0, torch.arange(int(self.memory.lengths[0])))
            self.stored = {position: number for number, position in enumerate(positions.tolist())}
            return
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        for start in range(0, ids.shape[1], 512):
            self.model(ids[:, start : start + 512], past_key_values=self.cache, logits_to_keep=1)

    def bytes_a_token(self, tokens: int) -> int:
        """What a token of the text takes in the cache, or in the memory."""
        if self.plain:
            return sum(2 * layer.keys.nbytes for layer in self.cache.layers) // tokens
        return int(self.memory.nbytes) // tokens

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(T, vocabulary) of ids that follow the text; what was read stays as it was."""
        if not self.plain:
            # (1, T, V)
            found = self.lm(torch.tensor([ids]), memory=self.memory).logits
        else:
            found = self.model(torch.tensor([ids]), past_key_values=copy.deepcopy(self.cache)).logits
        assert found is not None
        return found[0].float()

    def question(self, text: str) -> list[int]:
        """Ids of a question, behind what it quotes."""
        ids = ids_of(self.tokenizer, self.begin + text)
        if not self.quotes:
            return ids
        neutral = ids_of(self.tokenizer, self.begin + NEUTRAL)
        return quoted(self.lm, self.tokenizer, self.memory, ids, self.quotes, quoting_of(self.tokenizer, ids, neutral))

    def ask(self, question: str, answer: str) -> tuple[bool, float, list[int], list[int]]:
        """Whether each token of the answer is the most likely; its loss in nats a token; both, and what was likely."""
        asked = self.question(question)
        wanted = ids_of(self.tokenizer, answer)
        scores = self.logits(asked + wanted)[len(asked) - 1 : -1].log_softmax(-1)
        likely = scores.argmax(-1).tolist()
        loss = -float(scores[torch.arange(len(wanted)), wanted].mean())
        return likely == wanted, loss, wanted, likely

    def say(self, question: str, tokens: int) -> str:
        """The likeliest continuation, until a sentence or a line ends."""
        ids = self.question(question)
        said: list[int] = []
        for _ in range(tokens):
            said.append(int(self.logits(ids + said)[-1].argmax()))
            if re.search(r"[.\n]", self.tokenizer.decode(said)):
                break
        return str(self.tokenizer.decode(said)).strip(" .\n")


def look(subject: Subject, fact: Fact, others: Sequence[Fact], question: str, text: str) -> dict[int, list[float]]:
    """By layer, means over the answer: found by any head, its weight, other facts' answers', the rest's, local."""
    right = places_of(fact, text, subject.tokenizer, subject.stored)
    wrong = [
        place
        for other in others
        if other is not fact
        for place in places_of(other, text, subject.tokenizer, subject.stored)
    ]
    asked = ids_of(subject.tokenizer, subject.begin + question)
    wanted = ids_of(subject.tokenizer, fact.answer)
    trace = Weights()
    subject.lm.recorder = Recorder(attention=trace)  # type: ignore[arg-type]
    try:
        subject.logits(asked + wanted)
    finally:
        subject.lm.recorder = None
    length = len(asked) + len(wanted)
    result = {}
    for layer, (weights, rows) in trace.seen.items():
        groups = weights.shape[0]
        # (G, R, T, K): the best head counts.
        weights, rows = (part.reshape(groups, -1, length, part.shape[-1]) for part in (weights, rows))
        found, heavy, outweighed, rest, local = [], [], [], [], []
        for step in range(len(wanted)):
            if right[step] < 0:
                continue
            here, there = weights[:, :, len(asked) - 1 + step], rows[:, :, len(asked) - 1 + step]
            mine = (here * (there == right[step])).sum(-1)
            best = int(mine.argmax())
            flat_here, flat_there = here.flatten(0, 1)[best], there.flatten(0, 1)[best]
            theirs = float((flat_here * torch.isin(flat_there, torch.tensor(wrong))).sum())
            found.append(float(bool((there == right[step]).any())))
            heavy.append(float(mine.max()))
            outweighed.append(theirs)
            rest.append(float(flat_here.sum()) - theirs - float(mine.max()))
            local.append(1 - float(flat_here.sum()))
        if found:
            result[layer] = [sum(part) / len(part) for part in (found, heavy, outweighed, rest, local)]
    return result


def measure(subject: Subject, book: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One text, read once and asked of in all ways."""
    facts = make_facts(args.facts, seed)
    # The front matter of a book is left out.
    sentences = sentences_of(book[len(book) // 10 :])
    text, _ = text_with(facts, sentences, lambda one: len(ids_of(subject.tokenizer, one)), args.tokens, seed)
    tokens = len(ids_of(subject.tokenizer, text))
    began = time.process_time()
    subject.read(text)
    read = time.process_time() - began
    outcome: dict[str, Any] = {"tokens": tokens, "who": who_of(args), "book": args.book.stem, "seed": seed}
    outcome |= {"facts": len(facts), "read_ms": round(1000 * read / tokens, 2), "bytes": subject.bytes_a_token(tokens)}
    for way in ("told", "other"):
        right: dict[str, list[bool]] = defaultdict(list)
        losses, wrong = [], []
        heads: dict[int, list[list[float]]] = defaultdict(list)
        for fact in facts:
            question = fact.told if way == "told" else fact.other
            good, loss, wanted, _ = subject.ask(question, fact.answer)
            right[fact.group].append(good)
            losses.append(loss)
            if not good and args.say:
                wrong.append(f"{fact.group}: {subject.say(question, len(wanted) + 1)}")
            if args.heads and not args.plain:
                for layer, numbers in look(subject, fact, facts, question, text).items():
                    heads[layer].append(numbers)
        outcome[way] = sum(map(sum, right.values()))
        outcome[f"{way}_by_group"] = {group: f"{sum(good)}/{len(good)}" for group, good in right.items()}
        outcome[f"{way}_loss"] = round(sum(losses) / len(losses), 3)
        if args.say:
            outcome[f"{way}_wrong"], outcome[f"{way}_distinct_wrong"] = wrong, len(set(wrong))
        for layer, rows in sorted(heads.items()):
            means = [round(sum(column) / len(column), 3) for column in zip(*rows, strict=True)]
            names = ("found", "weight", "other facts", "text", "window")
            outcome.setdefault(f"{way}_layers", {})[layer] = dict(zip(names, means, strict=True))
    return outcome


def who_of(args: argparse.Namespace) -> str:
    """What is asked, in a word of the figure's legend."""
    if args.plain:
        return PLAIN
    if args.free is not None:
        return FREE
    quotes = f", {args.quotes} quotes" if args.quotes else ""
    return f"{args.backbone}, {f'layers {args.layers}' if args.layers else args.retriever}{quotes}"


def draw(log: Path, file: Path) -> None:
    """Share answered against tokens, one line for each of what was asked, with 95 % Wilson intervals."""
    from matplotlib import pyplot

    asked: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in log.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        # Texts of one size differ by a few tokens.
        asked[one["who"]][2 ** round(math.log2(one["tokens"]))].append(one)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, way, words in zip(axes, ("told", "other"), ("the words they were told in", "other words"), strict=True):
        for who, sizes in asked.items():
            points = []
            for tokens, lines in sorted(sizes.items()):
                right, of = sum(one[way] for one in lines), sum(one["facts"] for one in lines)
                points.append((tokens, 100 * right / of, *(100 * end for end in wilson(right, of))))
            places, middle, low, high = (list(column) for column in zip(*points, strict=True))
            size = [one["bytes"] for lines in sizes.values() for one in lines]
            label = f"{who}: {sorted(size)[len(size) // 2] / 1000:.0f} KB a token"
            (line_drawn,) = axis.plot(places, middle, marker="o", label=label)
            axis.fill_between(places, low, high, alpha=0.15, color=line_drawn.get_color())
        axis.set(xscale="log", ylim=(-2, 102), xlabel="tokens in memory or context", title=f"asked in {words}")
        axis.set_xticks(sorted({tokens for sizes in asked.values() for tokens in sizes}))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens // 1024:.0f}k")
        axis.minorticks_off()
    axes[0].set_ylabel("facts answered, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Prints one JSON line a seed, and the sums; or draws what a log holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, nargs="?")
    parser.add_argument("--backbone", help="smollm2-135m-fot, or what it was trained from where that is asked")
    parser.add_argument("--layers", default="", help="memory layers of an untrained backbone")
    parser.add_argument(
        "--free", nargs="*", metavar="NAME=VALUE", help="without training: the recipe, with these settings in its place"
    )
    parser.add_argument("--plain", action="store_true", help="read everything in the backbone's own context")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256, help="of an untrained backbone")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--score-factor", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quotes", type=int, default=0, help="passages that a question is asked behind")
    parser.add_argument("--newline", action="store_true", help="a line break before each question")
    parser.add_argument("--say", action="store_true", help="say what is answered in place of what is right")
    parser.add_argument("--heads", action="store_true", help="tell found and weighed pairs by layer")
    parser.add_argument("--retriever", default="exact", help="of weights that were trained")
    parser.add_argument("--log", type=Path, help="file that lines are added to")
    parser.add_argument("--figure", type=Path, help="draws the log into this file, and measures nothing")
    args = parser.parse_args()
    if args.figure is not None and args.log is not None:
        draw(args.log, args.figure)
        return
    if args.book is None or args.figure is not None:
        parser.error("give a book to tell facts in, or --figure FILE and --log FILE to draw what was measured")
    if args.backbone is None:
        untrained = args.plain or args.free is not None or args.layers
        args.backbone = "smollm2-135m" if untrained else "smollm2-135m-fot"
    if args.facts > MOST_FACTS:
        parser.error(f"--facts: at most {MOST_FACTS}")
    book = args.book.read_text(encoding="utf-8", errors="replace")
    subject = Subject(args)
    outcomes = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        outcomes.append(measure(subject, book, args, seed))
        print(json.dumps(outcomes[-1]), flush=True)
        if args.log is not None:
            with args.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(outcomes[-1]) + "\n")
    count = args.facts * len(outcomes)
    told, other = (sum(one[way] for one in outcomes) for way in ("told", "other"))
    print(f"{told} of {count} in told words, {other} of {count} in other words", flush=True)


if __name__ == "__main__":
    main()
