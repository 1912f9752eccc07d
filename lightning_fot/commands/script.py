"""Verbs, and who owns the script ``lightning``. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

OPT_OUT = "LIGHTNING_FOT_NO_SHIM"


DISTRIBUTION = "lightning-fot"


CONFIG_VERBS = frozenset({"run", "fit", "validate", "test", "predict", "sweep"})


OTHER_VERBS = frozenset(
    {"bench", "ingest", "ask", "serve", "memories", "forget", "export", "lm-eval", "report", "retrievers", "doctor"}
)


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def find_other() -> EntryPoint | None:
    """The ``lightning`` script of another installed distribution, if there is one."""
    for entry in entry_points(group="console_scripts", name="lightning"):
        if entry.dist is not None and _normalised(entry.dist.name) == DISTRIBUTION:
            continue
        if not entry.value.startswith("lightning_fot."):
            return entry
    return None


def claims(arguments: Sequence[str]) -> bool:
    """Whether a command line is certainly ours, even when another distribution has a ``lightning`` script.

    ``run`` and its siblings are ours when a configuration is named: other tools have verbs of the same name.
    """
    if not arguments:
        return False
    verb, rest = arguments[0], arguments[1:]
    if verb in CONFIG_VERBS:
        return any(word in ("-c", "--config") or word.startswith(("-c=", "--config=")) for word in rest)
    return verb in OTHER_VERBS
