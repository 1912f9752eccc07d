"""``lightning lm-eval``: EleutherAI's lm-evaluation-harness on a model with its memory on."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.pretrained.backbones import load_tokenizer
from lightning_fot.request.harness import MODEL_NAME, batch_count, model_settings

INSTALL = "pip install 'lightning-fot[lm-eval]'"
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


def lm_eval(words: Sequence[str], program: str) -> int:
    """Runs the command.

    Args:
        words: Words after ``lm-eval``.
        program: How it was called.

    Returns:
        Exit code.

    Raises:
        SettingError: A setting of the model cannot work: said before the harness is loaded.
        MissingLibraryError: The harness is not installed.
    """
    own, rest = split(words, program)
    if not words or any(word in ("-h", "--help") for word in rest):
        print(HELP.format(program=program, install=INSTALL))
        return 0
    if not any(word.partition("=")[0] in ("--tasks", "-t") for word in rest):
        raise SettingError("tasks", None, "are not given", f"Write: {program} --config hnsw --tasks niah_single_1")
    batch_count(_last(rest, "--batch_size", "-b") or 1)
    settings = model_settings(own)
    if find_spec("lm_eval") is None:
        raise MissingLibraryError("lm_eval", INSTALL, "lm-eval")
    with _tokenizer_folder(settings.backbone) as tokenizer:
        # RULER's tasks measure their prompts with it. What the user says of the metadata comes later, and wins.
        metadata = json.dumps({"tokenizer": tokenizer})
        own.pop("model.backbone", None)
        # The harness names results after `pretrained`.
        model = json.dumps({"pretrained": settings.backbone, **own})
        arguments = ["--model", MODEL_NAME, "--model_args", model, "--metadata", metadata, *rest]
        return _harness(arguments)


def split(words: Sequence[str], program: str) -> tuple[dict[str, Any], list[str]]:
    """Parts what describes our model from what is the harness's.

    Args:
        words: Words of the command line.
        program: For messages.

    Returns:
        Settings by name, and the words left.

    Raises:
        SettingError: A setting has no value, or the model is one of the harness's own.

    Example:
        >>> split(["--config", "hnsw", "--tasks", "a", "--model.memory.top_k=8"], "lm-eval")
        ({'config': 'hnsw', 'model.memory.top_k': '8'}, ['--tasks', 'a'])
    """
    own: dict[str, Any] = {}
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--model", "-M", "--model_args", "-a"):
            fix = "Describe it with --config and --model.KEY=VALUE; for others call lm_eval itself."
            raise SettingError(name, value or None, f"is always {MODEL_NAME} here", fix)
        if name not in ("--config", "-c", "--ckpt_path") and not name.startswith("--model."):
            rest.append(word)
            continue
        if not equals:
            if not pending:
                raise SettingError("arguments", word, "has no value", f"See {program} --help")
            value = pending.pop(0)
        own["config" if name == "-c" else name.removeprefix("--")] = value
    return own, rest


def _last(words: Sequence[str], *names: str) -> str | None:
    """Value of an option, the last one given; None where it is not, or has none."""
    found = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else (words[place + 1] if place + 1 < len(words) else None)
    return found


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
