"""The command line: ``lightning``, ``lightning-fot`` and ``python -m lightning_fot``.

Imports only the standard library at the top: help and short answers come at once, and mistakes are told before torch
loads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.system.openmp import wait_briefly
from lightning_fot.system.output import end, make_patient
from lightning_fot.system.package import shipped

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
  ask         ask that memory a question, or one of a server (--url): ask MEMORY "question"
  serve       memories over HTTP, for OpenAI's clients: serve MEMORY… --port 8000
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

# Where each verb is, loaded when it is asked for. All are called with words, program and whether to debug.
VERBS = {
    "run": "job.verbs:run",
    "fit": "job.verbs:fit",
    "validate": "job.verbs:validate",
    "test": "job.verbs:test",
    "predict": "job.verbs:predict",
    "sweep": "sweep:sweep",
    "report": "report:report",
    "bench": "bench.bench:bench",
    "ingest": "ingest:ingest",
    "ask": "ask:ask",
    "serve": "serve:serve",
    "memories": "memories:memories",
    "forget": "forget:forget",
    "lm-eval": "lm_eval:lm_eval",
    "export": "export:export",
    "retrievers": "retrievers:retrievers",
    "doctor": "doctor:doctor",
}


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
    program = program_name()
    if not words or words[0] in ("-h", "--help", "help"):
        configs = ", ".join(sorted(path.stem for path in shipped("configs").glob("*.yaml")))
        print(HELP.format(program=program, configs=configs))
        return 0
    if words[0] in ("-V", "--version"):
        from lightning_fot import __version__

        print(f"lightning-fot {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        # `predict` is known only to say what to do instead.
        known = sorted(set(VERBS) - {"predict"})
        raise SettingError("verb", verb, "is not a command", f"{close_match(verb, known)}Commands: {', '.join(known)}.")
    module, _, name = VERBS[verb].partition(":")
    command: Callable[[list[str], str, bool], int] = getattr(import_module(f"lightning_fot.commands.{module}"), name)
    return command(rest, f"{program} {verb}", debug)
