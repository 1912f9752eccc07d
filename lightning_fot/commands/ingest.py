"""``lightning ingest``: reads documents into a named memory on disk."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.config.memory import OF_THE_MACHINE
from lightning_fot.errors import SettingError
from lightning_fot.library.changes import find_changes
from lightning_fot.library.library import FILE, Library, count, find_folder, is_free, size_of
from lightning_fot.pretrained.delta import SHIPPED
from lightning_fot.pretrained.memory_settings import pretrained_settings
from lightning_fot.pretrained.quiet import quietly
from lightning_fot.request.model import settings_of, settings_with
from lightning_fot.request.request import CONFIG, RETRIEVER, Request, make_request
from lightning_fot.request.words import Given, Option, Verb, assignments, read

if TYPE_CHECKING:
    from lightning_fot.data.text.parts import Found
    from lightning_fot.library.changes import Changes
    from lightning_fot.library.ingest import Reader

DEFAULT_CONFIG = "smollm2_fot"
# Of a backbone of the user's own.
FREE_CONFIG = "training_free"
_WORKERS = (
    Option("workers", "processes that read, each with a backbone of its own", int),
    Option("address", "of the Ray cluster that they are part of", str),
)
VERB = Verb("lightning ingest", (CONFIG, *_WORKERS), settings=("model.", "ckpt_path"), plain=("MEMORY", "PATH…"))
HELP = """\
Usage: {program} MEMORY PATH… [--config NAME|FILE] [--ckpt_path FILE] [--model.KEY=VALUE …]

Reads documents into a memory on disk, to be asked with: {ask} MEMORY "question"

  MEMORY      a name (kept in memories/NAME) or a folder
  PATH        files or folders of text, source code (one document a folder) or .jsonl (one document a line)

  --config    model settings: a shipped name or a YAML; the rest of the file is not used (default: {default}; of
              another backbone its own settings, and {free} where it has none and you name no memory layers)
  --ckpt_path trained weights: a checkpoint, or last for checkpoints/last.ckpt beside the YAML
  --workers   processes that read, each with a backbone of its own and each document by itself (extra ray)
  --address   of the Ray cluster that they are part of; without it, this machine's cores share the work
  --model.…   such as --model.backbone=FOLDER, --model.memory.capacity=1000000, --model.memory.retriever=faiss_ivf

Stopped (Ctrl-C) or killed, the same command goes on where it was; documents that were read already are skipped, and one
that stands where it stood with another text replaces what was read there. More documents may be added at any time; the
settings stay those of the memory, which need not be given again. See also: {memories}, {forget}"""
# Names in one note.
_NAMED = 5


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
        others = {verb: program.replace("ingest", verb) for verb in ("ask", "memories", "forget")}
        print(HELP.format(program=program, default=DEFAULT_CONFIG, free=FREE_CONFIG, **others))
        return 0
    name, *paths = given.plain
    _check_workers(given)
    folder = find_folder(name)
    library = _library(folder, given, program)
    library.model.check()
    found = _find(paths)
    command = shlex.join([*program.split(), *words])
    with library.locked():
        library.refresh()
        changes = find_changes(found, library, paths)
        left_out = found.skipped_text(named=True)
        if not (changes.unread or changes.known or changes.gone or changes.outdated):
            raise SettingError("PATH", paths, f"holds no text ({left_out})", "Give text files in UTF-8.")
        for note in _notes(left_out, changes, library, program, name):
            print(note, file=sys.stderr)
        if not (changes.unread or changes.outdated or changes.renamed):
            library.write()
            print(f"Nothing to read: {folder} has all of it, {count(len(library), 'document')}.")
            return 0
        return _read(library, changes, given, command, program, name, debug)


def _check_workers(given: Given) -> None:
    workers, address = given.options.workers, given.options.address
    if workers is not None and workers < 1:
        raise SettingError("--workers", workers, "must be at least 1", "Give the number of processes, or leave it out.")
    if address is not None and workers is None:
        raise SettingError("--address", address, "is that of workers", "Give --workers too, or leave it out.")


def _library(folder: Path, given: Given, program: str) -> Library:
    """The library in the folder, or a new one."""
    if not (folder / FILE).is_file():
        if not is_free(folder):
            raise SettingError(
                "MEMORY", str(folder), "is a folder of other things", "Give the memory first, then the documents."
            )
        return Library(folder, settings_of(_request(given, program, new=True)))
    library = Library.read(folder)
    named = any(name == RETRIEVER for name, _ in assignments(given.settings))
    library.refuse_foreign(given=named or bool(given.options.config))
    request = _request(given, program)
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
    machine = {key: asked.memory[key] for key in OF_THE_MACHINE}
    library.model = replace(library.model, memory={**library.model.memory, **machine})
    return library


def _request(given: Given, program: str, new: bool = False) -> Request:
    """What is asked for; of a new memory, with a configuration where none is named."""
    configs = list(given.options.config)
    if configs or not new:
        request = make_request("ingest", configs, given.settings, program)
        for note in request.notes if configs else ():
            print(note, file=sys.stderr)
        return request
    named = dict(assignments(given.settings))
    backbone = named.get("model.backbone")
    foreign = backbone is not None and backbone not in SHIPPED
    if foreign and pretrained_settings(str(backbone)):
        # It says itself how its memory is to be.
        return make_request("ingest", [], given.settings, program)
    free = foreign and not {"model.memory.memory_layers", "ckpt_path"} & named.keys()
    request = make_request("ingest", [FREE_CONFIG if free else DEFAULT_CONFIG], given.settings, program)
    # What a configuration says of the borders of windows is for its own weights and windows alone.
    memory = request.settings["model"]["memory"]
    if isinstance(memory, dict) and not {"model.memory.overlap", "model.memory.sink_tokens"} & named.keys():
        window = memory.get("window")
        room = 0 if foreign and not free else window // 4 if isinstance(window, int) else None
        if room is not None:
            memory.update({key: min(memory.get(key, 0), room) for key in ("overlap", "sink_tokens")})
    return request


def _find(paths: list[str]) -> Found:
    from lightning_fot.data.text.readers import find_documents

    return find_documents(paths, setting="PATH", lenient=True)


def _notes(left_out: str, changes: Changes, library: Library, program: str, word: str) -> Iterator[str]:
    """What to say before anything is read."""
    if left_out:
        yield f"Left out: {left_out}."
    known = [f"{changes.known:,} read already"] * bool(changes.known)
    known += [f"{changes.twice:,} with the same text as another"] * bool(changes.twice)
    if known:
        yield f"Left out: {', '.join(known)}."
    if changes.outdated:
        outdated = _listed([entry.name for entry in changes.outdated])
        yield f"Forgets {count(len(changes.outdated), 'former version')}: {outdated}."
    forget = f"{program.replace('ingest', 'forget')} {shlex.quote(word)}"
    if changes.gone:
        names = [entry.name for entry in changes.gone]
        yield (
            f"No longer there, still in the memory: {_listed(names)}. To forget: "
            f"{forget} {' '.join(map(shlex.quote, names[:_NAMED]))}"
        )
    for entry, name in changes.renamed:
        yield f"Stands elsewhere now: {entry.name} is called {name}."
    leaving = {entry.name for entry in (*changes.outdated, *(entry for entry, _ in changes.renamed))}
    taken = [
        one.source.name
        for one in changes.unread
        if library.named(one.source.name) and library.find(one.digest) is None and one.source.name not in leaving
    ]
    if taken:
        yield f"Another document has this name, and both are kept: {_listed(taken)}. To forget one: {forget} NAME"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _read(library: Library, changes: Changes, given: Given, command: str, program: str, word: str, debug: bool) -> int:
    from lightning_fot.system.progress import JobProgress, format_seconds
    from lightning_fot.system.signals import StopGuard, Stopped

    with quietly(debug), JobProgress() as progress, StopGuard(progress.message) as guard:
        try:
            progress.message(f"Loading {library.model.backbone} …")
            from lightning_fot.training.opening import open_model

            lm, tokenizer = open_model(library.model)
            reader = _reader(given, lm, tokenizer, library, progress, guard)
        except Stopped as stopped:
            progress.message("Stopped before anything was read.")
            return stopped.exit_code
        loading = progress.elapsed
        guard.deferred = True
        try:
            reader.read(changes)
        except Stopped as stopped:
            progress.close()
            progress.message(_how_to_go_on(library, reader.name, command, lm.config))
            return stopped.exit_code
        finally:
            reader.close()
        seconds = reader.seconds
    speed = reader.tokens / max(seconds, 1e-9)
    gone = reader.skipped.text(named=True)
    if gone:
        print(f"Could not be read any more: {gone}.", file=sys.stderr)
    print(
        f"Read {count(reader.documents, 'document')}, {reader.tokens:,} tokens in {format_seconds(seconds)} "
        f"({speed:,.0f} tokens/s), after {format_seconds(loading)} of loading.\n"
        f"{library.path}: {count(len(library), 'document')}, {len(reader.memory):,} tokens stored, "
        f"{size_of(library.path)}.\n"
        f'Ask it: {program.replace("ingest", "ask")} {shlex.quote(word)} "…"'
    )
    return 0


def _reader(given: Given, *args: Any) -> Reader:
    from lightning_fot.library.ingest import Reader

    if given.options.workers is None:
        return Reader(*args)
    from lightning_fot.library.workers import ParallelReader

    return ParallelReader(*args, count=given.options.workers, address=given.options.address)


def _how_to_go_on(library: Library, name: str, command: str, config: Any) -> str:
    done = sum(document.done for document in library.documents)
    complete = f"{count(done, 'document')} complete in {library.path}"
    said = f"Stopped and saved: {complete}. Go on with the same command:\n{command}"
    if config.overlap or config.sink_tokens:
        said += (
            f"\n{name} will be read again from its start, since windows overlap (model.memory.overlap, sink_tokens)."
        )
    return said
