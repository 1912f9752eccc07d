"""Answers of ``lightning serve`` to 1, 4 and 16 clients at once, against one client and against one ``generate``.

    python benchmarks/serving.py                    # SmolLM2's shipped weights beside 8,192 tokens of real text
    python benchmarks/serving.py --text BOOK.txt --tokens 32768 --retriever exact
    python benchmarks/serving.py --tiny             # random weights, seconds: shows that it works

A server runs in a process of its own; clients are threads that stream over HTTP, each its own prompt, all at once. In
turns with them, in this process and on the same rows beside the same memory, each of these goes from the prompts to the
last token:

- ``generate``: one call of the model's ``generate`` for all rows;
- ``together``: the rows side by side in one batch, as the server's engine has them, without server and passages;
- ``noted``: the same, with attention noted for the passages;
- ``served, no passages`` and ``served``: the clients.

So each way has what the one before lacks, and what it loses against that one is the price of it. Printed are ratios of
tokens a second and of times to the first token, medians of those within a turn: a machine that others use as well blurs
a ratio but does not tilt it. ``agreed`` says how many answers of the clients are ``generate``'s token for token; the
sums of a batch are rounded otherwise than those of a single row, so that two tokens may change places.
"""

from __future__ import annotations

import support.openmp  # isort: skip # noqa: F401

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch
from support.report import Report, Row, table
from support.timing import Stamps, interleave, spread

from lightning_fot.cli import main as lightning
from lightning_fot.library.library import Library
from lightning_fot.memory.passages import AttentionTrace
from lightning_fot.model.reading.together import Together
from lightning_fot.training.opening import open_model

NAME = "bench"
WAYS = ("generate", "together", "noted", "served, no passages", "served")
_COLUMNS = {
    "clients": "clients",
    "way": "way",
    "of_generate": "tokens/s, x generate",
    "of_generate_q1": "q1",
    "of_generate_q3": "q3",
    "of_one": "x one client",
    "first_of_generate": "first token, x generate",
    "first_of_one": "x one client",
    "agreed": "agreed",
}


@dataclass(frozen=True)
class Turn:
    """What one way did once.

    Args:
        seconds: From the prompts to the last token.
        tokens: Generated.
        first: Median seconds to a row's first token; NaN where it was not noted.
        answers: Texts, by row.
    """

    seconds: float
    tokens: int
    first: float
    answers: list[str]


class Direct:
    """The model in this process.

    Args:
        library: What it reads.
        new: Tokens of an answer.
    """

    def __init__(self, library: Library, new: int) -> None:
        self.lm, self.tokenizer = open_model(library.model)
        self.memory = library.load(self.lm)
        self.memory.flush()
        self.new = new
        eos = self.tokenizer.eos_token_id
        self.ends = [] if eos is None else [int(eos)]

    def generate(self, prompts: Sequence[list[int]]) -> Turn:
        """One call for all rows; the first token is noted where there is one row."""
        width, rows = max(map(len, prompts)), len(prompts)
        ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        stamps = Stamps()
        began = time.perf_counter()
        out = self.lm.generate(
            ids, self.memory.select_rows(torch.zeros(rows, dtype=torch.int64)), attention_mask=mask,
            max_new_tokens=self.new, do_sample=False, eos_token_id=self.ends or None,
            pad_token_id=self.ends[0] if self.ends else 0, **({"streamer": stamps} if rows == 1 else {}),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        answers = [self._answer(row) for row in out[:, width:].tolist()]
        first = stamps.times[1] - began if rows == 1 else float("nan")
        return Turn(seconds, sum(map(len, answers)), first, [self._text(ids) for ids in answers])

    def together(self, prompts: Sequence[list[int]], noted: bool) -> Turn:
        """Side by side, prompts one after the other first."""
        began = time.perf_counter()
        texts = [self.lm.continuation(one, self.memory, AttentionTrace() if noted else None) for one in prompts]
        last = [one[-1] for one in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        for text in texts:
            while not text.ready:
                text.read_part()
        batch = Together(self.lm.attachment)
        going = list(range(len(prompts)))
        first = float("nan")
        while going:
            chosen = batch.go_on([texts[row] for row in going], [last[row] for row in going]).argmax(-1).tolist()
            first = time.perf_counter() - began if first != first else first
            for row, token in zip(going, chosen, strict=True):
                last[row] = token
                answers[row].append(token)
            going = [row for row in going if len(answers[row]) < self.new and last[row] not in self.ends]
        seconds = time.perf_counter() - began
        return Turn(seconds, sum(map(len, answers)), first, [self._text(ids) for ids in answers])

    def _answer(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self.ends]
        return ids[: ends[0] + 1] if ends else ids

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Served:
    """A server in a process of its own.

    Args:
        address: Where, as host and port.
        new: Tokens of an answer.
    """

    def __init__(self, address: str, new: int) -> None:
        self.address = address
        self.new = new

    def turn(self, prompts: Sequence[list[int]], passages: int) -> Turn:
        """Each prompt by a client of its own."""
        gate = threading.Barrier(len(prompts) + 1)
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = [pool.submit(self._ask, one, passages, gate) for one in prompts]
            gate.wait()
            began = time.perf_counter()
            found = [one.result() for one in asked]
            seconds = time.perf_counter() - began
        firsts = sorted(first for first, _, _ in found)
        return Turn(
            seconds, sum(count for _, count, _ in found), firsts[len(firsts) // 2], [text for *_, text in found]
        )

    def _ask(self, prompt: list[int], passages: int, gate: threading.Barrier) -> tuple[float, int, str]:
        """Seconds to the first token, tokens, and the text."""
        body = {
            "model": NAME, "prompt": prompt, "max_tokens": self.new, "passages": passages, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = HTTPConnection(self.address)
        connection.connect()
        gate.wait()
        began, first, parts, count = time.perf_counter(), float("nan"), list[str](), 0
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode())
        for line in response:
            data = line.strip().removeprefix(b"data:").strip()
            if not data or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event))
            for choice in event["choices"]:
                first = time.perf_counter() - began if first != first else first
                parts.append(choice["text"])
            count = event["usage"]["completion_tokens"] if event.get("usage") else count
        connection.close()
        return first, count, "".join(parts)


@contextmanager
def served(folder: Path, most: int, new: int) -> Iterator[Served]:
    """Starts a server of the memory below a folder; it ends with the block."""
    words = ["serve", NAME, "--port=0", f"--max_batch={most}", f"--max_tokens={new}", "--timeout=600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_fot", *words], cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            found = re.search(r"http://([\d.]+:\d+)", line)
            if found:
                break
        else:
            raise RuntimeError("".join(said))
        yield Served(found[1], new)
    finally:
        process.terminate()
        process.communicate()


def real_text(file: Path | None) -> str:
    """The file's, or that of Python's own help, which is prose."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(given: argparse.Namespace, folder: Path, report: Report) -> list[Row]:
    """A row for each number of clients and way."""
    text = real_text(given.text)
    # About four letters a token: the rest is cut by count below.
    (folder / "text.txt").write_text(text[: 4 * given.tokens], encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        settings = [f"--config={given.config}", f"--model.memory.retriever={given.retriever}"]
        if lightning(["ingest", NAME, "text.txt", *settings]) != 0:
            raise SystemExit("the text could not be read")
    finally:
        os.chdir(before)
    direct = Direct(Library.read(folder / "memories" / NAME), given.new)
    ids = direct.tokenizer(text[4 * given.tokens :], verbose=False, add_special_tokens=False)["input_ids"]
    draw = random.Random(0)
    report.progress(f"{len(direct.memory):,} tokens in memory")
    rows: list[Row] = []
    with served(folder, max(given.clients), given.new) as server:
        turns: dict[tuple[int, str], list[Turn]] = {}

        def method(clients: int, way: str, prompts: Sequence[list[int]]) -> Any:
            def call() -> float:
                if way == "generate":
                    turn = direct.generate(prompts)
                elif way in ("together", "noted"):
                    turn = direct.together(prompts, way == "noted")
                else:
                    turn = server.turn(prompts, 5 if way == "served" else 0)
                turns.setdefault((clients, way), []).append(turn)
                return turn.seconds

            return call

        methods = {}
        for clients in given.clients:
            prompts = []
            for _ in range(clients):
                start, length = draw.randrange(len(ids) - 64), draw.randrange(24, 56)
                prompts.append(ids[start : start + length])
            methods |= {f"{clients} {way}": method(clients, way, prompts) for way in WAYS}
        with torch.no_grad():
            interleave(methods, given.turns)
    least = min(given.clients)
    # The first of each was to warm up.
    kept = {key: found[1:] for key, found in turns.items()}
    for (clients, way), found in kept.items():
        batch, one = kept[clients, "generate"], kept[least, way]
        rates = [a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in zip(found, batch, strict=True)]
        gains = [a.tokens / a.seconds / (b.tokens / b.seconds) for a, b in zip(found, one, strict=True)]
        row: Row = {"clients": clients, "way": way, "tokens": found[0].tokens}
        row |= spread(rates).as_dict("of_generate") | spread(gains).as_dict("of_one")
        if clients == 1:
            row |= spread([a.first / b.first for a, b in zip(found, batch, strict=True)]).as_dict("first_of_generate")
        if way != "generate":
            row |= spread([a.first / b.first for a, b in zip(found, one, strict=True)]).as_dict("first_of_one")
        row["agreed"] = f"{sum(a == b for a, b in zip(found[0].answers, batch[0].answers, strict=True))}/{clients}"
        rows.append(row)
    return rows


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2_fot", help="configuration of the model")
    parser.add_argument("--text", type=Path, help="text of the memory and the prompts; default: Python's own help")
    parser.add_argument("--tokens", type=int, default=8192, help="about how many the memory has")
    parser.add_argument("--retriever", default="hnsw")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--tiny", action="store_true", help="random weights and small sizes")
    given = parser.parse_args()
    if given.tiny:
        given.config, given.tokens, given.clients, given.new, given.turns = "smoke", 300, [1, 3], 6, 1
    if 1 not in given.clients:
        parser.error("--clients: give 1 as well, which the others are compared to")
    report = Report(given.json, {name: value for name, value in vars(given).items() if name not in ("json", "text")})
    report.head()
    report.start("serving")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given, Path(folder), report)
    report.add("serving", rows)
    table("Answers to so many clients at once", _COLUMNS, rows)


if __name__ == "__main__":
    main()
