"""``lightning retrievers``: every retriever found, built-in and plug-ins."""

from __future__ import annotations


def _retrievers() -> int:
    from rich.console import Console
    from rich.table import Table

    from lightning_fot.retrievers import available_retrievers

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("retriever", "from", "version", "state"):
        table.add_column(title, overflow="fold")
    for name, info in available_retrievers().items():
        state = "ready" if info.importable else f"{info.error or 'cannot be imported'}. {info.install or ''}".strip()
        table.add_row(name, info.source, info.version or "", state)
    # What a broken plug-in says may look like markup.
    Console(markup=False).print(table)
    return 0
