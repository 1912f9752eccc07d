"""Forgetting documents of a library, so that a kill at any moment leaves them whole or gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fot.library.library import Entry, Library
    from lightning_fot.memory.memory import Memory


def forget(library: Library, memory: Memory, entries: Sequence[Entry]) -> int:
    """Takes documents from a library, with all that its memory holds of them.

    Args:
        library: Locked.
        memory: The library's; it is saved without them.
        entries: Of the library.

    Returns:
        Pairs that went, of each memory layer and KV head.

    Raises:
        SettingError: The folder cannot be written.
    """
    if not entries:
        return 0
    for entry in entries:
        entry.leaving = True
        library.changed(entry)
    # What a kill cuts short from here on, whoever writes next will end: see library.
    library.write(durable=True)
    pairs, known = 0, False
    for entry in entries:
        # Of which nothing is stored (any more) the memory may not know; and with others it may forget that one too.
        if memory.log.find(entry.name):
            pairs, known = pairs + memory.forget(entry.name), True
    if known:
        memory.save(library.path)
    for entry in entries:
        library.remove(entry)
    library.write()
    return pairs
