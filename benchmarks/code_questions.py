"""Questions on a code base, made from the syntax trees of the standard library and scored by exact match.

    python benchmarks/code_questions.py                             # shipped weights, exact search, 200 questions
    python benchmarks/code_questions.py --retriever hnsw --modules tarfile zipfile
    python benchmarks/code_questions.py --plain                     # each module alone in the backbone's own context

Modules are read into one memory, each as a document. Then it is asked

- ``parameters``: the first two parameters of a function: behind ``def NAME(`` (told), and in other words;
- ``default``: the default of a parameter: behind the signature up to ``PARAMETER=`` (told), and in other words;
- ``where``: the module that defines the function. The document whose pairs the question attends to most counts.

Only functions whose name is defined once in all modules are asked of. Right is an answer all of whose tokens are the
most likely ones. ``--plain`` gives each question the module it is about, so that it has no other to mistake it for;
modules beyond the backbone's positions are left out there, and their questions with them. The memory is also scored
on the questions that are left (``in reach``). Shipped weights were trained on sources of modules from ``a`` to ``cgi``;
those asked here come later in the alphabet. The same questions beside no memory (``none``) say what is guessed.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import ast
import copy
import json
import random
import sysconfig
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fot import attach_pretrained
from lightning_fot.evaluation.measures.passkey import wilson
from lightning_fot.library.answering import quoted
from lightning_fot.pretrained import load_backbone, load_tokenizer

MODULES = (
    *("fractions", "gettext", "heapq", "plistlib", "poplib", "quopri", "sched", "shelve", "shlex", "smtplib", "string"),
    *("tabnanny", "textwrap", "timeit", "trace", "zipapp"),
)


@dataclass(frozen=True)
class Question:
    """One question; ``where`` has no answer in words.

    Args:
        kind: ``parameters``, ``default`` or ``where``.
        module: What defines it.
        told: What stands in the source before the answer.
        other: The question in other words.
        answer: What follows both.
    """

    kind: str
    module: str
    told: str
    other: str
    answer: str


def source_of(module: str) -> str:
    """Text of a module of the standard library."""
    file = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    if not file.is_file():
        raise SystemExit(f"--modules: {module} has no source in this Python")
    return file.read_text(encoding="utf-8")


def questions_of(sources: dict[str, str]) -> list[Question]:
    """All that can be asked of some modules."""
    functions = [
        (module, node)
        for module, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    ]
    times = Counter(node.name for _, node in functions)
    found = []
    for module, node in functions:
        if times[node.name] > 1 or node.name.startswith("__"):
            continue
        found.append(Question("where", module, f"def {node.name}(", f"Question: Where is {node.name} defined?", ""))
        arguments = node.args
        plain = [one.arg for one in [*arguments.posonlyargs, *arguments.args]]
        if arguments.posonlyargs or any(one.annotation for one in arguments.args):
            continue
        text = " ".join(sources[module].splitlines()[node.lineno - 1 : node.body[0].lineno])
        first = f"{plain[0]}, {plain[1]}" if len(plain) > 1 else ""
        if first and text.lstrip().startswith(f"def {node.name}({first}"):
            asked = f"Question: Which parameters does {node.name} take?\nAnswer: ("
            found.append(Question("parameters", module, f"def {node.name}(", asked, first))
        for name, default in zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True):
            value = ast.get_source_segment(sources[module], default)
            start = text.find(f"{name}={value}")
            if value is None or start < 0 or not isinstance(default, ast.Constant):
                continue
            told = text[: start + len(name) + 1].lstrip()
            asked = f"Question: Which default has the parameter {name} of {node.name}?\nAnswer: {name}="
            found.append(Question("default", module, told, asked, value))
    return found


class Memory:
    """All modules in one memory."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, sources: dict[str, str]) -> None:
        self.tokenizer = tokenizer
        self.lm = attach_pretrained(args.backbone, retriever=args.retriever)
        self.memory = self.lm.new_memory()
        self.quotes = args.quotes
        began, read = time.monotonic(), 0
        for module, text in sources.items():
            ids = torch.tensor([encode(tokenizer, text)])
            self.lm.ingest(ids, self.memory, document=module)
            read += ids.shape[1]
        print(f"{read:,} tokens read, {read / (time.monotonic() - began):.0f} a second", flush=True)

    def logits(self, module: str, ids: list[int], memory: bool = True) -> torch.Tensor:
        """(T, V) behind the memory, which stays as it is, or behind nothing."""
        found = self.lm(torch.tensor([ids]), memory=self.memory if memory else self.lm.new_memory()).logits
        assert found is not None
        return found[0]

    def behind_quotes(self, ids: list[int]) -> list[int]:
        """A question behind what it quotes."""
        return quoted(self.lm, self.tokenizer, self.memory, ids, self.quotes)

    def attended(self, ids: list[int]) -> str:
        """The document that draws most attention."""
        with self.lm.record_attention() as trace:
            self.lm(torch.tensor([ids]), memory=self.memory)
        best = trace.passages(self.memory, top=1)
        return str(best[0].document.name) if best else ""


class Context:
    """The module of a question in the backbone's own context."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, sources: dict[str, str]) -> None:
        from transformers import DynamicCache

        self.model = load_backbone("smollm2-135m")
        most = self.model.config.max_position_embeddings - 128
        self.caches: dict[str, Any] = {}
        for module, text in sources.items():
            ids = torch.tensor([encode(tokenizer, text)])
            if ids.shape[1] <= most:
                self.caches[module] = DynamicCache()
                for start in range(0, ids.shape[1], 512):
                    piece = ids[:, start : start + 512]
                    self.model(piece, past_key_values=self.caches[module], logits_to_keep=1)

    def logits(self, module: str, ids: list[int], memory: bool = True) -> torch.Tensor:
        """(T, V) behind the module, or behind nothing."""
        cache = copy.deepcopy(self.caches[module]) if memory else None
        found = self.model(torch.tensor([ids]), past_key_values=cache).logits[0]
        assert isinstance(found, torch.Tensor)
        return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def answered(subject: Memory | Context, tokenizer: Any, question: Question, asked: str, memory: bool) -> bool:
    """Whether each token of the answer is the most likely one."""
    # A token may reach over the end of the question: the answer is what the whole text has behind it.
    whole = encode(tokenizer, f"\n{asked}{question.answer}")
    begin = encode(tokenizer, f"\n{asked}")
    shared = next((place for place, (a, b) in enumerate(zip(begin, whole, strict=False)) if a != b), len(begin))
    shared = min(shared, len(whole) - 1)
    ids, answer = whole[:shared], whole[shared:]
    if memory and isinstance(subject, Memory):
        ids = subject.behind_quotes(ids)
    said = subject.logits(question.module, ids + answer, memory)[len(ids) - 1 : -1].argmax(-1).tolist()
    return bool(said == answer)


@torch.no_grad()
def main() -> None:
    """Prints share right by kind and words, with 95 % Wilson intervals over questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m-fot")
    parser.add_argument("--retriever", default="exact")
    parser.add_argument("--modules", nargs="+", default=MODULES)
    parser.add_argument("--questions", type=int, default=200, help="of all kinds together")
    parser.add_argument("--quotes", type=int, default=0, help="passages that a question is asked behind")
    parser.add_argument("--plain", action="store_true", help="the backbone, with the module in its own context")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer("smollm2-135m")
    sources = {module: source_of(module) for module in args.modules}
    chosen = questions_of(sources)
    random.Random(args.seed).shuffle(chosen)
    # As many of each kind as there are, in turn.
    kinds = defaultdict(list)
    for question in chosen:
        kinds[question.kind].append(question)
    turns = [
        kinds[kind][number] for number in range(len(chosen)) for kind in sorted(kinds) if number < len(kinds[kind])
    ]
    turns = turns[: args.questions]
    most = 8192 - 128
    in_reach = {module for module, text in sources.items() if len(encode(tokenizer, text)) <= most}
    subject = Context(args, tokenizer, sources) if args.plain else Memory(args, tokenizer, sources)
    right: dict[tuple[str, str, str, str], list[bool]] = defaultdict(list)
    beside = "context" if args.plain else args.retriever
    for question in turns:
        near = question.module in in_reach
        if args.plain and (question.kind == "where" or not near):
            continue
        for words, asked in (("told", question.told), ("other", question.other)):
            if isinstance(subject, Memory) and question.kind == "where":
                goods = {beside: subject.attended(encode(tokenizer, f"\n{asked}")) == question.module}
            else:
                goods = {
                    memory: answered(subject, tokenizer, question, asked, memory != "none")
                    for memory in ("none", beside)
                }
            for memory, good in goods.items():
                right[question.kind, words, memory, "all"].append(good)
                if near:
                    right[question.kind, words, memory, "in reach"].append(good)
    for (kind, words, memory, modules), found in sorted(right.items()):
        low, high = wilson(sum(found), len(found))
        line = {"kind": kind, "words": words, "memory": memory, "modules": modules}
        line |= {"right": sum(found), "of": len(found)}
        print(json.dumps(line | {"percent": [round(100 * part, 1) for part in (sum(found) / len(found), low, high)]}))


if __name__ == "__main__":
    main()
