"""Tries every decoder type of the installed transformers with the deep suite, and writes a page of the documentation.

    python -m tests.support.backbone_survey survey.jsonl                          # some half an hour of one core
    python -m tests.support.backbone_survey survey.jsonl --page docs/backbones.md # goes on, then writes the page
    python -m tests.support.backbone_survey survey.jsonl --types llama gemma2     # these alone, and again

Each type is a process of its own with a limit on processor time and memory: some cannot be made small. What was found
stands in the log, a line a type, so that an interrupted survey goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from tests.support.decoder_types import decoder_types, tiny
from tests.support.deep import WINDOW, deep_faults

SECONDS, BYTES = 40, 6 << 30
SERVED, WRONG, REFUSED, UNBUILT = "served", "wrong", "refused", "not built"
# Sections of the page, and what became of the types in them.
TITLES = {"Served": SERVED, "Wrong": WRONG, "Refused": REFUSED, "Not tried": UNBUILT}
Finding = dict[str, Any]


def examine(name: str) -> Finding:
    """What becomes of a memory layer in a tiny model of a type: ``outcome``, and why.

    The last layer that is accepted goes through the deep suite.
    """
    finding: Finding = {"type": name, "transformers": transformers.__version__}
    try:
        model = tiny(name)
    except Exception as error:
        return {**finding, "outcome": UNBUILT, "why": first_line(error)}
    finding["class"] = type(model).__name__
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 4)
    reasons = []
    for layer in reversed(range(count)):
        try:
            with attach_memory(model, MemoryConfig(memory_layers=[layer], window=WINDOW, top_k=1000)) as lm:
                states = bool(lm.attachment.states.layers)
        except SettingError as error:
            reasons.append(error.problem)
            continue
        faults = deep_faults(model, layer, states)
        limits = [check for check, fault in faults.items() if fault.startswith(SettingError.__name__)]
        wrong = {check: fault for check, fault in faults.items() if check not in limits}
        finding.update(layer=layer, states=states, limits=limits)
        return {**finding, "outcome": WRONG if wrong else SERVED, "why": wrong}
    return {**finding, "outcome": REFUSED, "why": reasons[-1]}


def first_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _child(name: str, seconds: int, into: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 5))
    torch.set_num_threads(1)
    into.send(examine(name))


def examine_apart(name: str, seconds: int = SECONDS) -> Finding:
    """:func:`examine` in a process of its own; what takes longer, or dies, is a type that could not be tried."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, seconds, sender))
    process.start()
    sender.close()
    unbuilt: Finding = {"type": name, "transformers": transformers.__version__, "outcome": UNBUILT}
    try:
        found: Finding = receiver.recv()
        return found
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        why = f"takes more than {seconds} s of a core" if slow else f"its process ended with {process.exitcode}"
        return {**unbuilt, "why": why}
    finally:
        process.kill()
        process.join()


def read_log(file: Path) -> dict[str, Finding]:
    """Findings by type; the last of a type counts."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {finding["type"]: finding for finding in map(json.loads, lines)}


# What differs from model to model, or from run to run, in reasons that are the same.
_GENERAL = [
    (r" by \S+ of the spread in (window|row) \d+( of a padded batch)? \(rounding [^)]*\)", " by more than rounding"),
    (r"\bmemory layers \[\d+(, \d+)*\]", "memory layers"),
    (r"\blayers? \[?\d+(, \d+)*\]?", "a layer"),
    (r"the backbone's \d+ ", "the backbone's layers "),
]


def general(reason: str) -> str:
    """A reason without the numbers of one model."""
    for pattern, words in _GENERAL:
        reason = re.sub(pattern, words, reason)
    return reason.replace("|", "/")


def page(findings: Sequence[Finding]) -> str:
    """The page of the documentation."""
    versions = sorted({finding["transformers"] for finding in findings})
    by_outcome: dict[str, list[Finding]] = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: finding["type"]):
        by_outcome[finding["outcome"]].append(finding)
    served = by_outcome[SERVED]
    parts = [
        "# Model classes\n",
        f"Every decoder type of transformers {', '.join(versions)}: {len(served)} are served, "
        f"{len(by_outcome[REFUSED])} refused, {len(by_outcome[UNBUILT])} not tried (why: below).\n\n"
        "Each was built with four layers and random weights. *Served* means that a memory layer passed the deep\n"
        "suite (`tests/support/deep.py`): plain forward, windows, an overlap, cached decoding, padded batches and\n"
        "gradients, against a dense reading that shares no code with the package. *Refused* is what attaching a\n"
        "memory says. A script writes this page:\n\n"
        "```bash\npython -m tests.support.backbone_survey survey.jsonl --page docs/backbones.md\n```\n",
        f"## Served ({len(served)})\n",
        "| type | class | beside attention | refused while reading |\n|---|---|---|---|",
    ]
    for finding in served:
        states = "states stay local" if finding["states"] else ""
        parts.append(f"| `{finding['type']}` | {finding['class']} | {states} | {', '.join(finding['limits'])} |")
    for title, outcome in TITLES.items():
        if outcome == SERVED or not by_outcome[outcome]:
            continue
        reasons: dict[str, list[str]] = defaultdict(list)
        for finding in by_outcome[outcome]:
            why = finding["why"]
            words = why if isinstance(why, str) else "; ".join(f"{check}: {fault}" for check, fault in why.items())
            reasons[general(words)].append(f"`{finding['type']}`")
        parts += [f"\n## {title} ({len(by_outcome[outcome])})\n", "| types | why |\n|---|---|"]
        listed = sorted(reasons.items(), key=lambda entry: (-len(entry[1]), entry[0]))
        parts += [f"| {', '.join(types)} | {reason} |" for reason, types in listed]
    return "\n".join(parts) + "\n"


def read_page(text: str) -> dict[str, str]:
    """Outcome by type, as a page has them.

    Raises:
        ValueError: A type stands there twice, or a heading counts others than stand below it.
    """
    found: dict[str, str] = {}
    for title, count, section in re.findall(
        r"^## ([^\n(]+) \((\d+)\)$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    ):
        # The first cell of each row.
        types = [
            name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
        ]
        if len(types) != int(count) or not found.keys().isdisjoint(types) or len(set(types)) != len(types):
            raise ValueError(f"{title}: {count} are counted, {len(types)} listed, or one stands there twice")
        found |= dict.fromkeys(types, TITLES[title])
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="findings, a line a type; what stands there is not tried again")
    parser.add_argument("--types", nargs="+", help="these alone, though they stand in the log")
    parser.add_argument("--page", type=Path, help="write the page from all findings of the log")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor time of a type at most")
    given = parser.parse_args()
    known = read_log(given.log)
    for name in given.types or [name for name in decoder_types() if name not in known]:
        finding = examine_apart(name, given.seconds)
        with given.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(finding) + "\n")
        print(f"{name:30} {finding['outcome']:10} {finding['why'] or ''}", flush=True)
    if given.page:
        found = read_log(given.log)
        unseen = {
            "transformers": transformers.__version__,
            "outcome": UNBUILT,
            "why": "the survey has not come to it yet",
        }
        given.page.write_text(
            page([found.get(name, {"type": name, **unseen}) for name in decoder_types()]), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
