"""``lightning ingest``: reads documents into a named memory on disk."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.library.library import FILE, Library, count, find_folder, is_free
from lightning_fot.pretrained.quiet import quietly
from lightning_fot.request.model import settings_of, settings_with
from lightning_fot.request.request import CONFIG, Request, make_request
from lightning_fot.request.words import Given, Verb, read

if TYPE_CHECKING:
    from lightning_fot.data.text.parts import DocumentSource, Found

DEFAULT_CONFIG = "hnsw"
VERB = Verb("lightning ingest", (CONFIG,), settings=("model.", "ckpt_path"), plain=("MEMORY", "PATH…"))
HELP = """\
Usage: {program} MEMORY PATH… [--config NAME|FILE] [--ckpt_path FILE] [--model.KEY=VALUE …]

Reads documents into a memory on disk, to be asked with: {ask} MEMORY "question"

  MEMORY      a name (kept in memories/NAME) or a folder
  PATH        files or folders of text, source code (one document a folder) or .jsonl (one document a line)

  --config    model settings: a shipped name or a YAML (default: {default}); the rest of the file is not used
  --ckpt_path trained weights: a checkpoint, or last for checkpoints/last.ckpt beside the YAML
  --model.…   such as --model.backbone=FOLDER, --model.memory.capacity=1000000, --model.memory.retriever=faiss_ivf

Stopped (Ctrl-C) or killed, the same command goes on where it was; documents that were read already are skipped. More
documents may be added at any time; the settings stay those of the memory, which need not be given again."""


def ingest(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``ingest``.
        program: How it was called.
        debug: Leave the libraries' log lines on.

    Returns:
        Exit code: 0, or 130 and 143 when stopped by a signal.

    Raises:
        SettingError: An argument, a document or the folder cannot be used.
    """
    given = read(words, replace(VERB, program=program))
    if given.help:
        print(HELP.format(program=program, ask=program.replace("ingest", "ask"), default=DEFAULT_CONFIG))
        return 0
    name, *paths = given.plain
    folder = find_folder(name)
    library = _library(folder, given, program)
    library.model.check()
    found = _find(paths)
    command = shlex.join([*program.split(), *words])
    with library.locked():
        library.refresh()
        sources, known = _unread(found, library)
        if not sources and not known:
            raise SettingError(
                "PATH", paths, f"holds no text ({found.skipped_text(named=True)})", "Give text files in UTF-8."
            )
        for note in (found.skipped_text(), known):
            if note:
                print(f"Left out: {note}.", file=sys.stderr)
        if not sources:
            print(f"Nothing to read: {folder} has all of it, {count(len(library.documents), 'document')}.")
            return 0
        return _read(library, sources, found.skipped, command, program, name, debug)


def _library(folder: Path, given: Given, program: str) -> Library:
    """The library in the folder, or a new one."""
    if not (folder / FILE).is_file():
        if not is_free(folder):
            raise SettingError(
                "MEMORY", str(folder), "is a folder of other things", "Give the memory first, then the documents."
            )
        return Library(folder, settings_of(_request(given, program, DEFAULT_CONFIG)))
    library = Library.read(folder)
    request = _request(given, program, None)
    # Without a configuration only what is named counts; all else is the memory's own.
    asked = settings_of(request) if request.configs else settings_with(library.model, request)
    own, other = library.model.flat(), asked.flat()
    different = [key for key in own if own[key] != other.get(key)]
    if different:
        raise SettingError(
            different[0],
            other[different[0]],
            f"{folder} was made with {', '.join(f'{key}={own[key]!r}' for key in different)}",
            "Leave these settings out, or ingest into a new memory.",
        )
    machine = {key: asked.memory[key] for key in ("offload", "offload_dir")}
    library.model = replace(library.model, memory={**library.model.memory, **machine})
    return library


def _request(given: Given, program: str, default: str | None) -> Request:
    configs = list(given.options.config)
    if not configs and default is not None:
        configs = [default]
    request = make_request("ingest", configs, given.settings, program)
    for note in request.notes if given.options.config else ():
        print(note, file=sys.stderr)
    return request


def _find(paths: list[str]) -> Found:
    from lightning_fot.data.text.readers import find_documents

    return find_documents(paths, setting="PATH")


def _unread(found: Found, library: Library) -> tuple[list[tuple[DocumentSource, str]], str]:
    """Documents that are not in the library yet, with the digests of their texts; and what to say of the others.

    Whatever turns out to be no text is added to ``found.skipped``.
    """
    unread: dict[str, DocumentSource] = {}
    read = twice = 0
    for source in found.documents:
        digest, empty = hashlib.sha256(), True
        for piece in source.pieces(found.skipped):
            digest.update(piece.encode("utf-8", "surrogatepass"))
            empty = empty and not piece.strip()
        if empty:
            continue
        entry = library.find(digest.hexdigest())
        if entry is not None and entry.done:
            read += 1
        elif digest.hexdigest() in unread:
            twice += 1
        else:
            unread[digest.hexdigest()] = source
    notes = [f"{read:,} read already"] * bool(read) + [f"{twice:,} with the same text as another"] * bool(twice)
    return [(source, digest) for digest, source in unread.items()], ", ".join(notes)


def _read(
    library: Library,
    sources: list[tuple[DocumentSource, str]],
    skipped: Counter[str],
    command: str,
    program: str,
    word: str,
    debug: bool,
) -> int:
    from lightning_fot.system.progress import JobProgress, format_seconds
    from lightning_fot.system.signals import StopGuard, Stopped

    with quietly(debug), JobProgress() as progress, StopGuard(progress.message) as guard:
        try:
            progress.message(f"Loading {library.model.backbone} …")
            from lightning_fot.library.ingest import Reader
            from lightning_fot.training.opening import open_model

            lm, tokenizer = open_model(library.model)
            reader = Reader(lm, tokenizer, library, progress, guard)
        except Stopped as stopped:
            progress.message("Stopped before anything was read.")
            return stopped.exit_code
        guard.deferred = True
        try:
            reader.read(sources)
        except Stopped as stopped:
            progress.close()
            progress.message(_how_to_go_on(library, reader.name, command, lm.config))
            return stopped.exit_code
        seconds = progress.elapsed
    speed = reader.tokens / max(seconds, 1e-9)
    size = sum(file.stat().st_size for file in library.path.iterdir() if file.is_file()) / 2**20
    gone = reader.skipped - skipped
    if gone:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in gone.items())
        print(f"Could not be read any more: {lost}.", file=sys.stderr)
    print(
        f"Read {count(len(sources), 'document')}, {reader.tokens:,} tokens in {format_seconds(seconds)} "
        f"({speed:,.0f} tokens/s).\n"
        f"{library.path}: {count(len(library.documents), 'document')}, {len(reader.memory):,} tokens stored, "
        f"{size:,.1f} MiB.\n"
        f'Ask it: {program.replace("ingest", "ask")} {shlex.quote(word)} "…"'
    )
    return 0


def _how_to_go_on(library: Library, name: str, command: str, config: Any) -> str:
    done = sum(document.done for document in library.documents)
    complete = f"{count(done, 'document')} complete in {library.path}"
    said = f"Stopped and saved: {complete}. Go on with the same command:\n{command}"
    if config.overlap or config.sink_tokens:
        said += (
            f"\n{name} will be read again from its start, since windows overlap (model.memory.overlap, sink_tokens)."
        )
    return said
