"""The command line: ``lightning``, ``lightning-fot`` and ``python -m lightning_fot``.

Imports only the standard library at the top: help and short answers come at once, and mistakes are told before torch
loads.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fot.commands.retrievers import _retrievers
from lightning_fot.commands.script import CONFIG_VERBS, OTHER_VERBS
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.system.openmp import wait_briefly
from lightning_fot.system.output import end, make_patient
from lightning_fot.system.ranks import rank, share_folder

if TYPE_CHECKING:
    from lightning_fot.request.request import Request

HELP = """\
lightning-fot: a memory of long documents for Llama-style models (Focused Transformer)

Usage: {program} VERB [--config NAME|FILE] [--key.sub=value ...]

  run         fine-tune on crossbatches, evaluate long context, write a report: the main job
  fit         only train
  validate    loss and perplexity on held-out documents, with memory
  test        the same, logged as test
  sweep       many retrievers, settings and trainings: one table, one Pareto figure; finished cells are kept
  report      rebuild the page of runs, or compare them: report RUN… --out FOLDER
  bench       recall and speed of retrievers on keys and queries in a file
  ingest      read documents into a named memory on disk: ingest MEMORY PATH…
  ask         ask that memory a question: ask MEMORY "question"
  memories    the memories here, or the documents of one: memories [MEMORY]
  forget      take documents out of a memory: forget MEMORY DOCUMENT…
  lm-eval     tasks of EleutherAI's lm-evaluation-harness, with memory
  export      write a trained run as a Hugging Face folder: export RUN_FOLDER OUT
  retrievers  every retriever found: built-in and plug-ins
  doctor      versions, devices, who owns the script name, a self-test

Examples:
  {program} run --config hnsw                                    the shipped configuration, SmolLM2 and HNSW
  {program} run --config hnsw --model.memory.retriever=scann     another retriever
  {program} run --config hnsw --data.paths=[books/]              your own documents
  {program} run --config hnsw --trainer.max_steps=0              evaluate without training
  {program} run --config hnsw --ckpt_path last                   go on after Ctrl-C
  {program} run --help                                           all settings, with their defaults

Shipped configurations: {configs}
--debug shows tracebacks and the libraries' log lines. --version prints the version."""

# `predict` is known only to say what to do instead.
VERBS = tuple(sorted((CONFIG_VERBS | OTHER_VERBS) - {"predict"}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: Words after the program's name; None takes ``sys.argv``.

    Returns:
        Exit code: 0; 1 when a self-test fails; 2 for what the user can correct; 130 and 143 when stopped by a signal.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    wait_briefly()
    make_patient()
    code = _run(words, debug)
    problem = end()
    if problem is not None:
        print(f"lightning-fot: error: standard output cannot be written: {problem}.", file=sys.stderr)
    return code if problem is None else code or 2


def _run(words: list[str], debug: bool) -> int:
    try:
        return _dispatch(words, debug)
    except (SettingError, MissingLibraryError) as error:
        if debug:
            raise
        print(f"lightning-fot: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nStopped.", file=sys.stderr)
        return 130
    except OSError as error:
        if debug or error.errno is None:
            raise
        fix = "Make room or choose another run_dir." if error.errno == 28 else "Add --debug for the traceback."
        print(f"lightning-fot: error: {error.filename or 'disk'}: {error.strerror}. {fix}", file=sys.stderr)
        return 2


def program_name() -> str:
    """How the user called the program."""
    name = Path(sys.argv[0]).name
    return name if name in ("lightning", "lightning-fot") else "python -m lightning_fot"


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from lightning_fot.request.request import SHIPPED

        configs = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        print(HELP.format(program=program_name(), configs=configs))
        return 0
    if words[0] in ("-V", "--version"):
        from lightning_fot import __version__

        print(f"lightning-fot {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "sweep":
        from lightning_fot.commands.sweep import sweep

        return sweep(rest, f"{program_name()} sweep", debug)
    if verb == "report":
        from lightning_fot.commands.report import report

        return report(rest, f"{program_name()} report")
    if verb in CONFIG_VERBS:
        return _with_config(verb, rest, debug)
    if verb == "bench":
        from lightning_fot.commands.bench.bench import bench

        return bench(rest, f"{program_name()} bench")
    if verb == "ingest":
        from lightning_fot.commands.ingest import ingest

        return ingest(rest, f"{program_name()} ingest", debug)
    if verb == "ask":
        from lightning_fot.commands.ask import ask

        return ask(rest, f"{program_name()} ask", debug)
    if verb == "memories":
        from lightning_fot.commands.memories import memories

        return memories(rest, f"{program_name()} memories", debug)
    if verb == "forget":
        from lightning_fot.commands.forget import forget

        return forget(rest, f"{program_name()} forget", debug)
    if verb == "export":
        from lightning_fot.commands.export import export

        return export(rest, f"{program_name()} export")
    if verb == "lm-eval":
        from lightning_fot.commands.lm_eval import lm_eval

        return lm_eval(rest, f"{program_name()} lm-eval")
    if verb in OTHER_VERBS:
        if rest and rest[0] in ("-h", "--help"):
            print(f"Usage: {program_name()} {verb}")
            return 0
        if rest:
            raise SettingError("arguments", " ".join(rest), f"{verb} takes none", f"Write: {program_name()} {verb}")
        return _retrievers() if verb == "retrievers" else _doctor()
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise SettingError("verb", verb, "is not a command", f"{hint}Commands: {', '.join(VERBS)}.")


def _doctor() -> int:
    from lightning_fot.commands.doctor import doctor

    return doctor()


def _with_config(verb: str, words: list[str], debug: bool) -> int:
    from lightning_fot.commands.job.choice import choose, claimed
    from lightning_fot.request.preflight import check_folder, check_settings, required_bytes
    from lightning_fot.request.request import read_request

    program = program_name()
    if verb == "predict":
        raise SettingError(
            "verb",
            verb,
            "a language model has no prediction loop",
            "Use run or validate; in Python, generate: lm.generate(ids, memory=memory).",
        )
    if "-h" in words or "--help" in words:
        return _complete_parse(["--help"])
    request = read_request(verb, words, program)
    if not request.configs:
        raise SettingError(
            "config",
            None,
            f"{verb} needs a configuration",
            f"Write: {program} {verb} --config hnsw (or your own YAML).",
        )
    check_settings(request)
    if any(word.startswith("--print_config") for word in words):
        return _complete_parse(_arguments(request))
    if verb in ("validate", "test"):
        checkpoint = choose(request)[1] if request.get("ckpt_path") is not None else None
        _say(request)
        from lightning_fot.commands.job.job import check

        return check(request, _arguments(request), checkpoint, debug=debug)
    folder, checkpoint = choose(request)
    check_folder(folder.path, required_bytes(request))
    with claimed(request, folder, checkpoint) as folder:
        if rank() == 0:
            share_folder(folder.path)
        _say(request)
        from lightning_fot.commands.job.job import run

        return run(request, _arguments(request), folder, checkpoint, evaluation=verb == "run", debug=debug)


def _say(request: Request) -> None:
    for note in request.notes:
        print(note, file=sys.stderr)


def _arguments(request: Request) -> list[str]:
    """What jsonargparse gets: real paths, and the overrides as given."""
    return [*(word for path in request.configs for word in ("--config", str(path))), *request.overrides]


def _complete_parse(arguments: list[str]) -> int:
    """Lets jsonargparse print its help or the resolved configuration."""
    from lightning_fot.commands.job.parsing import parse, quiet
    from lightning_fot.request.request import Request

    quiet()
    try:
        parse(Request("run", [], arguments), arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
