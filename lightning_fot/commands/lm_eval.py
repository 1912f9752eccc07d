"""``lightning lm-eval``: EleutherAI's lm-evaluation-harness on a model with its memory on."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.pretrained.backbones import load_tokenizer
from lightning_fot.request.harness import MODEL_NAME, batch_count, model_settings
from lightning_fot.request.request import CONFIG
from lightning_fot.request.words import Given, Option, Verb, assignments, read

INSTALL = "pip install 'lightning-fot[lm-eval]'"
# What is ours, what is looked at and left to the harness, and what is refused.
VERB = Verb(
    "lightning lm-eval",
    (
        CONFIG,
        Option("tasks", short="-t", passed=True),
        Option("batch_size", short="-b", passed=True),
        Option("model", short="-M"),
        Option("model_args", short="-a"),
    ),
    settings=("model.", "ckpt_path"),
    others=True,
)
HELP = """\
Usage: {program} --config NAME|FILE --tasks TASK… [--ckpt_path FILE] [--model.KEY=VALUE …] [options of lm_eval]

Runs the lm-evaluation-harness ({install}) on a backbone with its memory on. What fits the
local window is answered by the plain backbone; what is longer goes through the memory, uncut.

  --config NAME|FILE  as in run; only its section model counts. The last checkpoint of a run: --config
                      runs/hnsw/config.yaml --ckpt_path=last
  --model.KEY=VALUE   as in run: --model.memory.retriever=exact
  --tasks, --limit, --num_fewshot, --batch_size, --output_path, --metadata …
                      as in lm_eval run; see lm_eval run --help

Without a hub: tasks of your own (--include_path FOLDER), and of RULER, at 4,096 tokens and more,
  {program} --config hnsw --tasks niah_single_1,ruler_vt --limit 10 --metadata='{{"max_seq_lengths": [4096]}}'"""


def lm_eval(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``lm-eval``.
        program: How it was called.
        debug: Not used: every verb is called alike.

    Returns:
        Exit code.

    Raises:
        SettingError: A setting of the model cannot work: said before the harness is loaded.
        MissingLibraryError: The harness is not installed.
    """
    given = read(words, replace(VERB, program=program))
    if not words or given.help:
        print(HELP.format(program=program, install=INSTALL))
        return 0
    own = described(given)
    if given.options.tasks is None:
        raise SettingError("tasks", None, "are not given", f"Write: {program} --config hnsw --tasks niah_single_1")
    batch_count(given.options.batch_size or 1)
    settings = model_settings(own)
    if find_spec("lm_eval") is None:
        raise MissingLibraryError("lm_eval", INSTALL, "lm-eval")
    with _tokenizer_folder(settings.backbone) as tokenizer:
        # RULER's tasks measure their prompts with it. What the user says of the metadata comes later, and wins.
        metadata = json.dumps({"tokenizer": tokenizer})
        own.pop("model.backbone", None)
        # The harness names results after `pretrained`.
        model = json.dumps({"pretrained": settings.backbone, **own})
        arguments = ["--model", MODEL_NAME, "--model_args", model, "--metadata", metadata, *given.others]
        return _harness(arguments)


def described(given: Given) -> dict[str, Any]:
    """What describes our model, by name.

    Raises:
        SettingError: The model is one of the harness's own.
    """
    for name in ("model", "model_args"):
        value = getattr(given.options, name)
        if value is not None:
            fix = "Describe it with --config and --model.KEY=VALUE; for others call lm_eval itself."
            raise SettingError(f"--{name}", value, f"is always {MODEL_NAME} here", fix)
    last = given.options.config[-1:]
    return {**dict(zip(["config"], last, strict=False)), **dict(assignments(given.settings))}


@contextmanager
def _tokenizer_folder(backbone: str) -> Iterator[str]:
    """Where transformers finds the tokenizer of a backbone."""
    if Path(backbone).is_dir():
        yield backbone
        return
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(backbone).save_pretrained(folder)
        yield folder


def _harness(arguments: list[str]) -> int:
    """The harness's own command line, which reads ``sys.argv``, with our model registered."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", "run", *arguments]
    try:
        command = HarnessCLI()
        command.execute(command.parse_args())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0
