"""What a sweep is asked for: the section ``sweep`` of a configuration, checked, and the cells that it spans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_fot.config.memory import ProcessSettings
from lightning_fot.errors import SettingError, close_match
from lightning_fot.shards.engine import check_installed
from lightning_fot.sweep.grid import Build, check_count, combinations

if TYPE_CHECKING:
    from lightning_fot.sweep.space import SearchConfig

WORKERS = "sweep.workers"


@dataclass(frozen=True)
class TaskSettings(ProcessSettings):
    """Tasks that do the cells of a sweep (``sweep.workers``, the number alone or a mapping).

    Args:
        count: So many cells at once.
        address: As :class:`~lightning_fot.config.memory.ProcessSettings`.
        cpus: As there.
        memory_mib: As there.
        gpus: GPUs that a cell reserves; it sees no others.

    Raises:
        SettingError: A value is out of its range.
    """

    section: ClassVar[str] = WORKERS

    gpus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_amount("gpus")


@dataclass
class SweepConfig:
    """The section ``sweep``.

    Retrievers are measured on recorded keys and queries; ``runs`` are whole runs, which train and evaluate. A sweep has
    one of them, or both.

    Args:
        keys: ``.safetensors`` or ``.npz`` of ``lightning bench --record``; None records with the model and the text of
            the configuration.
        tokens: Keys a head that are recorded.
        queries: Held-out queries a head that are recorded and measured with.
        past: Past queries a head that a transform may learn from.
        recordings: Grid over settings of the model, such as ``{model.memory.positions: [first, none]}``: each
            combination is a recording of its own.
        retrievers: Names, or ``{name: ..., argument: value or list of values, query: {argument: list}}``. Lists span
            a grid; one build serves all settings of ``query``.
        memory_tokens: Keys a head that are searched, the newest of those recorded; None takes all.
        top_k: Neighbours wanted.
        batch: Queries a head in one call: 1 is decoding, 512 reading.
        repeats: Timed passes over the queries.
        runs: Grid over any settings, such as ``{model.crossbatch.d: [1, 2, 8]}``: each combination is a run.
        search: In place of a grid, or beside one: what Optuna tries
            (:class:`~lightning_fot.sweep.space.SearchConfig`).
        workers: Cells that are done at once, as tasks of a Ray cluster (needs the extra ``ray``): a number, or
            ``{count: ..., address: ..., cpus: ..., memory_mib: ..., gpus: ...}``; None does one after the other here.

    Raises:
        SettingError: A value is out of its range, or nothing is asked for.
    """

    keys: str | None = None
    tokens: int = 32_768
    queries: int = 1024
    past: int = 8192
    recordings: dict[str, list[Any]] = field(default_factory=dict)
    retrievers: list[Any] = field(default_factory=list)
    memory_tokens: list[int] | None = None
    top_k: list[int] = field(default_factory=lambda: [32])
    batch: list[int] = field(default_factory=lambda: [1, 512])
    repeats: int = 3
    runs: dict[str, list[Any]] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    workers: int | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "queries", "past", "repeats"):
            check_count(name, getattr(self, name))
        for name in ("top_k", "batch", "memory_tokens"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list) or not values:
                raise SettingError(f"sweep.{name}", values, "must be a list of numbers", f"Write {name}: [32].")
            for value in values:
                check_count(name, value)
        for name in ("recordings", "runs"):
            _check_grid(f"sweep.{name}", getattr(self, name))
        if not isinstance(self.retrievers, list):
            raise SettingError("sweep.retrievers", self.retrievers, "must be a list", "Write [exact, hnsw].")
        if not self.retrievers and not self.runs and self.search is None:
            raise SettingError("sweep", {}, "asks for nothing", "Name retrievers, or runs, or a search.")
        if self.keys is not None and self.recordings:
            raise SettingError("sweep.recordings", self.recordings, "cannot be had with keys", "Give one of them.")
        if self.keys is not None and not Path(self.keys).expanduser().is_file():
            raise SettingError("sweep.keys", self.keys, "no such file", "Make it with lightning bench --record.")
        largest = max(self.memory_tokens or [0])
        if self.keys is None and largest > self.tokens:
            raise SettingError(
                "sweep.memory_tokens", largest, f"is more than the tokens={self.tokens} recorded", "Raise sweep.tokens."
            )

    @classmethod
    def of(cls, section: Any) -> SweepConfig:
        """From the configuration's section.

        Raises:
            SettingError: The section is missing, or a key or a value is wrong.
        """
        if not isinstance(section, Mapping):
            raise SettingError("sweep", section, "is not in the configuration", "Write sweep: with retrievers or runs.")
        names = [item.name for item in dataclasses.fields(cls)]
        for key in section:
            if key not in names:
                raise SettingError(
                    f"sweep.{key}",
                    section[key],
                    "is not known",
                    f"{close_match(str(key), names)}Use {', '.join(names)}.",
                )
        return cls(**{str(key): value for key, value in section.items() if value is not None})

    def tasks(self) -> TaskSettings | None:
        """The section ``workers``, checked; None where cells are done here.

        Raises:
            SettingError: It is wrong.
            MissingLibraryError: Ray is not installed.
        """
        found = TaskSettings.read(self.workers)
        check_installed(found)
        return found

    @property
    def searches_indexes(self) -> bool:
        """Whether a search tries retrievers."""
        return self.search is not None and bool(self.search.get("retrievers"))

    def search_config(self) -> SearchConfig | None:
        """The section ``search``, checked; None where there is none.

        Raises:
            SettingError: It is wrong, or what it measures would not be one number.
            MissingLibraryError: Optuna, or the library of a retriever, is not installed.
        """
        if self.search is None:
            return None
        from lightning_fot.sweep.space import SearchConfig, check_optuna

        found = SearchConfig.of(self.search)
        for name in ("top_k", "batch", "memory_tokens") if found.retrievers else ():
            values = getattr(self, name) or [1]
            if len(values) > 1:
                raise SettingError(f"sweep.{name}", values, "is several, and a search compares alike", "Give one.")
        found.check()
        check_optuna()
        return found

    def builds(self) -> list[Build]:
        """Every retriever with every combination of its build arguments, exact search first, checked.

        Raises:
            SettingError: A retriever or an argument is unknown.
            MissingLibraryError: The library of one is not installed.
        """
        from lightning_fot.retrievers import check_retriever

        found: list[Build] = []
        # The others are compared with exact search, whether it is asked for or not.
        for entry in ["exact", *self.retrievers] if self.retrievers or self.searches_indexes else []:
            for build in _builds(entry):
                if build not in found:
                    found.append(build)
        for build in found:
            check_retriever(build.spec)
            for setting in build.query:
                check_retriever({**build.spec, **setting})
        return found


def _builds(entry: Any) -> Iterator[Build]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise SettingError(
            "sweep.retrievers", entry, "is neither a name nor has one", "Write {name: hnsw, M: [8, 16]}."
        )
    query = entry.get("query") or {}
    if not isinstance(query, Mapping):
        raise SettingError("sweep.retrievers.query", query, "must hold settings", "Write query: {ef_search: [32, 64]}.")
    arguments = {key: value for key, value in entry.items() if key not in ("name", "query")}
    if entry["name"] != "exact":
        # An index is what is measured, however few keys there are.
        arguments = {"min_index_size": 1, **arguments}
    settings = tuple(combinations(query)) if query else ({},)
    for chosen in combinations(arguments):
        yield Build({"name": entry["name"], **chosen}, settings)


def _check_grid(name: str, grid: Any) -> None:
    if not isinstance(grid, Mapping):
        raise SettingError(name, grid, "must map settings to lists", f"Write {name}: {{model.memory.top_k: [16, 32]}}.")
    for key, values in grid.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise SettingError(f"{name}.{key}", values, "must be a list of values", "Put it in brackets.")
