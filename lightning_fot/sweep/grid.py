"""Grids of settings: what they span, and names for their cells."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_fot.errors import SettingError


@dataclass(frozen=True)
class Build:
    """An index to be built, and the settings that it is asked with.

    Args:
        spec: ``{"name": name, **arguments}``.
        query: Query settings; one that is empty takes the retriever as it is.
    """

    spec: dict[str, Any]
    query: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        """``hnsw M=16``."""
        words = [f"{key}={value}" for key, value in self.spec.items() if key not in ("name", "min_index_size")]
        return " ".join([str(self.spec["name"]), *words])


def combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid; what is no list is one value.

    Example:
        >>> list(combinations({"M": [8, 16], "seed": 0}))
        [{'M': 8, 'seed': 0}, {'M': 16, 'seed': 0}]
    """
    axes = [value if isinstance(value, list) else [value] for value in grid.values()]
    for values in itertools.product(*axes):
        yield dict(zip(grid, values, strict=True))


def digest(value: Any) -> str:
    """A name for settings that does not depend on the order in which they were written."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label_of(combination: Mapping[str, Any]) -> str:
    """``d=8, positions=none``: the last word of each setting's name."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in combination.items())


def check_count(name: str, value: Any) -> None:
    """Refuses what is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"sweep.{name}", value, "must be a whole number of at least 1", "Correct it.")
