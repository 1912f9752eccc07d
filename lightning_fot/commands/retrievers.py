"""``lightning retrievers``: every retriever found, built-in and plug-ins."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_fot.request.words import Verb, read
from lightning_fot.retrievers import available_retrievers


def retrievers(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``retrievers``: there are none.
        program: How it was called.
        debug: Not used: every verb is called alike.

    Returns:
        Exit code.

    Raises:
        SettingError: There are words.
    """
    verb = Verb(program, about="Every retriever found: built-in and plug-ins.")
    if read(words, verb).help:
        print(verb.help())
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("retriever", "from", "version", "state"):
        table.add_column(title, overflow="fold")
    for name, info in available_retrievers().items():
        state = "ready" if info.importable else f"{info.error or 'cannot be imported'}. {info.install or ''}".strip()
        table.add_row(name, info.source, info.version or "", state)
    # What a broken plug-in says may look like markup.
    Console(markup=False).print(table)
    return 0
