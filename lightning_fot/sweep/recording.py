"""``lightning bench --record``: keys and queries of a model on real text, into a file to measure retrievers with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_fot.errors import SettingError
from lightning_fot.request.model import ModelSettings, settings_of
from lightning_fot.request.request import Request, make_request

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_fot.data.text.parts import Found

PHASE = "reading"


def record(
    target: Path,
    config: str,
    overrides: Sequence[str],
    tokens: int,
    past: int,
    queries: int,
    dtype: Literal["float16", "float32"] = "float16",
    *,
    program: str,
) -> int:
    """Runs the command.

    Args:
        target: The file.
        config: Configuration with the model and its text.
        overrides: Settings ``--model.…=…`` and ``--data.…=…``.
        tokens: Tokens whose keys are kept.
        past: Past queries kept of each head.
        queries: Queries to measure with.
        dtype: Of the file.
        program: How the command was called.

    Returns:
        Exit code: 0, or 130 and 143 when stopped by a signal.

    Raises:
        SettingError: A setting, the text or the file cannot work.
    """
    target = target.expanduser()
    _check_target(target)
    request = make_request("bench", [config], overrides, program)
    for note in request.notes:
        print(note, file=sys.stderr)
    model = settings_of(request)
    # What is recorded is all that was read, wherever a memory would be kept and however much of it.
    model = replace(model, memory={**model.memory, "capacity": None, "offload_dir": None, "retriever": "exact"})
    model.check()
    paths = request.get("data.paths")
    found = _find(request, paths)
    from lightning_fot.evaluation.measures.recording import RecordSettings

    settings = RecordSettings(tokens, past, queries, dtype)
    return _record(target, model, settings, found, _name(paths))


def _check_target(target: Path) -> None:
    if target.suffix != ".safetensors":
        raise SettingError("record", str(target), "is no .safetensors file", "End its name in .safetensors.")
    if target.is_dir():
        raise SettingError("record", str(target), "is a folder", "Give a file.")
    if not target.parent.is_dir():
        raise SettingError("record", str(target), f"there is no folder {target.parent}", "Make it first.")
    if not os.access(target.parent, os.W_OK):
        raise SettingError("record", str(target), f"{target.parent} cannot be written to", "Give another folder.")


def _find(request: Request, paths: Any) -> Found:
    from lightning_fot.data.text.readers import find_documents

    listed = [paths] if isinstance(paths, str) else paths
    return find_documents(listed, text_field=str(request.get("data.text_field", "text")))


def _name(paths: Any) -> str:
    if paths is None:
        return "the standard library of Python"
    return ", ".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))


def _record(
    target: Path,
    model: ModelSettings,
    settings: Any,
    found: Found,
    text: str,
) -> int:
    from lightning_fot.pretrained.quiet import quietly
    from lightning_fot.system.progress import JobProgress, format_seconds
    from lightning_fot.system.signals import StopGuard, Stopped

    stopped: Stopped | None = None
    with quietly(debug=False), JobProgress() as progress, StopGuard(progress.message) as guard:
        try:
            progress.message(f"Loading {model.backbone} …")
            from lightning_fot.training.opening import open_model

            lm, tokenizer = open_model(model)
        except Stopped as signal:
            progress.message("Stopped before anything was read.")
            return signal.exit_code
        from lightning_fot.evaluation.measures.recording import Recording

        recording = Recording(lm, settings)
        progress.plan([(PHASE, float(recording.wanted))])
        progress.start(PHASE)
        guard.deferred = True

        def window_read(tokens: int) -> None:
            progress.advance(tokens, f"{recording.tokens:,} of {recording.wanted:,} tokens")
            guard.check()

        try:
            for ids in _documents(found, tokenizer, recording.wanted):
                recording.read(ids, window_read)
                if recording.done:
                    break
        except Stopped as signal:
            stopped = signal
        if stopped is None:
            progress.finish(PHASE)
        progress.close()
        seconds = progress.elapsed
        tensors = recording.save(target, Path(model.backbone).name, text)
    if stopped is None and not recording.done:
        print(f"The text has {recording.tokens:,} tokens; {recording.wanted:,} were wanted.", file=sys.stderr)
    name = next(iter(tensors)).removesuffix("_keys")
    keys, past, queries = (len(tensors[f"{name}_{kind}"]) for kind in ("keys", "past_queries", "queries"))
    print(
        f"{'Stopped; kept' if stopped else 'Recorded'} {recording.tokens:,} tokens in {format_seconds(seconds)}: "
        f"{keys:,} keys, {past:,} past and {queries:,} held-out queries of each of {len(tensors) // 5} heads.\n"
        f"{target}: {target.stat().st_size / 2**20:,.1f} MiB"
    )
    return 0 if stopped is None else stopped.exit_code


def _documents(found: Found, tokenizer: Any, most: int) -> Iterator[Tensor]:
    """Ids (1, n) of each document; of one that is longer than ``most``, its beginning."""
    import torch

    from lightning_fot.data.text.tokens import TextEncoder

    encoder = TextEncoder(tokenizer)
    for source in found.documents:
        ids, _ = encoder.encode(source.pieces(found.skipped), most)
        if len(ids):
            yield torch.as_tensor(ids, dtype=torch.int64)[None]
