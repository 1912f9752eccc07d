"""``lightning forget``: takes documents out of a named memory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_fot.errors import SettingError, close_match
from lightning_fot.library.library import Library, count, existing, size_of
from lightning_fot.pretrained.quiet import quietly
from lightning_fot.request.words import Verb, read

if TYPE_CHECKING:
    from lightning_fot.library.library import Entry
    from lightning_fot.request.model import ModelSettings

VERB = Verb(
    "lightning forget",
    plain=("MEMORY", "DOCUMENT…"),
    plain_about=("a name below memories/, or a folder", "its name, as `memories MEMORY` lists it"),
    about="Takes documents, and all that the memory holds of them, out of a memory on disk.",
    epilog="Killed, the same command ends what it has begun. Ingested again, a document is read again.",
)


def forget(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``forget``.
        program: How it was called.
        debug: Leave the libraries' log lines on.

    Returns:
        Exit code: 0.

    Raises:
        SettingError: There is no such memory or document, or the folder cannot be written.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    memory, *names = given.plain
    memories = f"{program.removesuffix('forget')}memories {shlex.quote(memory)}"
    library = existing(memory)
    # Nothing is searched here.
    model = replace(library.model, memory={**library.model.memory, "retriever": "exact"})
    model.check()
    with library.locked():
        library.refresh()
        entries = [_entry(library, name, memories) for name in dict.fromkeys(names)]
        # What a command that was killed had begun to forget is ended here too.
        entries += [entry for entry in library.documents if entry.leaving and entry not in entries]
        pairs = _forget(library, model, entries, debug)
    print(
        f"Forgot {', '.join(entry.name for entry in entries)}: {count(pairs, 'token')} of each memory layer.\n"
        f"{library.path}: {count(len(library), 'document')}, {size_of(library.path)}."
    )
    return 0


def _entry(library: Library, name: str, memories: str) -> Entry:
    entry = library.named(name)
    if entry is None:
        near = close_match(name, [one.name for one in library.documents])
        raise SettingError("DOCUMENT", name, f"is not in {library.path}", f"{near}List them: {memories}")
    return entry


def _forget(library: Library, model: ModelSettings, entries: list[Entry], debug: bool) -> int:
    print(f"Loading {library.model.backbone} and {library.path} …", file=sys.stderr, flush=True)
    from lightning_fot.library.forget import forget
    from lightning_fot.training.opening import open_model

    with quietly(debug):
        lm, _ = open_model(model)
        pairs = forget(library, library.load(lm), entries)
    library.write_whole()
    return pairs
