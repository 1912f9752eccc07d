"""What a search may try: the section ``sweep.search`` of a configuration, checked without Optuna."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.sweep.grid import Build, check_count

# What is known of an index by the name that a search may ask for; the other way round where less is better.
INDEX_MEASURES = (
    *("recall", "recall_worst_head", "mass_recall", "mass", "speed", "qps"),
    *("search_ms_p50", "search_ms_p95", "search_ms_p99", "build_s", "add_s", "bytes"),
)
_RANGE = ("low", "high", "log", "step")
_Plain = str | int | float | bool | None
_Choice = TypeVar("_Choice", bound=_Plain)


class Trial(Protocol):
    """What draws values: a trial of Optuna."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number."""
        ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[_Choice]) -> _Choice:
        """One of several."""
        ...


@dataclass(frozen=True)
class Domain:
    """The values of one setting: a range, several values, or a single one.

    Args:
        setting: Its name, for messages.
        value: ``{low, high}`` with ``log`` or ``step``; a list to choose from; or the value.

    Raises:
        SettingError: It is no range, or an empty list.
    """

    setting: str
    value: Any

    def __post_init__(self) -> None:
        value = self.value
        if isinstance(value, list) and not value:
            raise SettingError(self.setting, value, "has nothing to choose from", "Name values, or give a range.")
        if not isinstance(value, Mapping):
            return
        for key in value:
            if key not in _RANGE:
                raise SettingError(self.setting, dict(value), f"{key} is not known", f"Use {', '.join(_RANGE)}.")
        for name in ("low", "high", "step"):
            bound = value.get(name, 1 if name == "step" else None)
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise SettingError(self.setting, dict(value), f"{name} is no number", "Write {low: 8, high: 64}.")
        low, high = value["low"], value["high"]
        if not low < high or value.get("step", 1) <= 0:
            raise SettingError(self.setting, dict(value), "is an empty range", "Let low be below high.")
        if value.get("log") and (low <= 0 or "step" in value):
            raise SettingError(self.setting, dict(value), "cannot be logarithmic", "Start above 0, without a step.")

    @property
    def examples(self) -> list[Any]:
        """Values that tell whether all of them can work."""
        if isinstance(self.value, Mapping):
            return [self.value["low"], self.value["high"]]
        return self.value if isinstance(self.value, list) else [self.value]

    def draw(self, trial: Trial, name: str) -> Any:
        """One of the values; a single one is not drawn."""
        if isinstance(self.value, list):
            if all(value is None or isinstance(value, str | int | float) for value in self.value):
                return trial.suggest_categorical(name, self.value)
            # Optuna keeps plain values only.
            return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in self.value]))
        if not isinstance(self.value, Mapping):
            return self.value
        low, high, log = self.value["low"], self.value["high"], bool(self.value.get("log", False))
        step = self.value.get("step")
        if all(isinstance(number, int) for number in (low, high, step or 1)):
            return trial.suggest_int(name, low, high, step=step or 1, log=log)
        return trial.suggest_float(name, low, high, step=step, log=log)


@dataclass
class SearchConfig:
    """The section ``sweep.search``: settings that Optuna tries one after the other, each told by those before.

    Args:
        retrievers: ``{name: ..., argument: domain, query: {argument: domain}}``; a domain is a range
            ``{low: 8, high: 64, log: true}``, a list to choose from, or a value.
        runs: In place of retrievers: settings of whole runs, ``{model.crossbatch.d: [1, 2, 8]}``.
        trials: Trials in all, of all processes.
        maximize: Measures that are to be large; for retrievers any of ``INDEX_MEASURES``, for runs a column of
            ``runs.csv``.
        minimize: Measures that are to be small.
        at_least: Lower bounds of measures: trials below them are no answer.
        at_most: Upper bounds.
        seed: Of what is drawn.
        storage: URL of an Optuna storage that processes share, such as ``sqlite:///search.db``; None keeps a journal in
            the folder of the sweep.

    Raises:
        SettingError: A value is out of its range, or nothing is asked for.
    """

    retrievers: list[Any] = field(default_factory=list)
    runs: dict[str, Any] = field(default_factory=dict)
    trials: int = 40
    maximize: list[str] | None = None
    minimize: list[str] = field(default_factory=list)
    at_least: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    storage: str | None = None

    def __post_init__(self) -> None:
        check_count("search.trials", self.trials)
        if not isinstance(self.retrievers, list) or not isinstance(self.runs, Mapping):
            raise SettingError(
                "sweep.search", vars(self), "must hold a list of retrievers, or runs", "See docs/sweeps.md."
            )
        if bool(self.retrievers) == bool(self.runs):
            raise SettingError("sweep.search", vars(self), "asks for nothing, or both", "Name retrievers, or runs.")
        if self.maximize is None:
            self.maximize = [] if self.runs or self.minimize else ["recall", "speed"]
        if not self.objectives:
            raise SettingError("sweep.search.minimize", [], "says nothing", "Write minimize: ['perplexity, exact'].")
        for name in (*self.objectives, *self.at_least, *self.at_most):
            if self.retrievers and name not in INDEX_MEASURES:
                hint = close_match(name, INDEX_MEASURES)
                raise SettingError("sweep.search", name, "is not measured", f"{hint}Use {', '.join(INDEX_MEASURES)}.")
        self._spaces = dict(map(self._space, self.retrievers))
        if len(self._spaces) < len(self.retrievers):
            raise SettingError("sweep.search.retrievers", self.retrievers, "names one twice", "Join their settings.")
        self._settings = {name: Domain(f"sweep.search.runs.{name}", value) for name, value in self.runs.items()}

    @classmethod
    def of(cls, section: Any) -> SearchConfig:
        """From the configuration's section.

        Raises:
            SettingError: A key or a value is wrong.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(section, Mapping):
            raise SettingError("sweep.search", section, "must hold settings", f"Use {', '.join(names)}.")
        for key in section:
            if key not in names:
                hint = close_match(str(key), names)
                raise SettingError(
                    f"sweep.search.{key}", section[key], "is not known", f"{hint}Use {', '.join(names)}."
                )
        return cls(**{str(key): value for key, value in section.items() if value is not None})

    @property
    def objectives(self) -> dict[str, str]:
        """``maximize`` or ``minimize`` by measure."""
        return dict.fromkeys(self.maximize or [], "maximize") | dict.fromkeys(self.minimize, "minimize")

    def _space(self, entry: Any) -> tuple[str, tuple[dict[str, Domain], dict[str, Domain]]]:
        key = "sweep.search.retrievers"
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or entry["name"] == "exact":
            raise SettingError(key, entry, "is no index", "Write {name: hnsw, M: {low: 4, high: 48}}.")
        query = entry.get("query") or {}
        if not isinstance(query, Mapping):
            raise SettingError(f"{key}.query", query, "must hold settings", "Write query: {ef_search: [32, 64]}.")
        given = {name: value for name, value in entry.items() if name not in ("name", "query")}
        # An index is what is measured, however few keys there are.
        given.setdefault("min_index_size", 1)
        build, asked = (
            {name: Domain(f"{key}.{name}", value) for name, value in part.items()} for part in (given, query)
        )
        return entry["name"], (build, asked)

    def check(self) -> None:
        """Checks the ends of all ranges of retrievers.

        Raises:
            SettingError: A retriever or an argument is unknown, or a value out of its range.
            MissingLibraryError: The library of one is not installed.
        """
        from lightning_fot.retrievers import check_retriever

        for name, spaces in self._spaces.items():
            for argument, domain in itertools.chain(*(space.items() for space in spaces)):
                for value in domain.examples:
                    check_retriever({"name": name, argument: value})

    def corners(self) -> list[dict[str, Any]]:
        """Combinations of settings of runs that hold every first and every last value."""
        if not self._settings:
            return []
        return [{name: domain.examples[end] for name, domain in self._settings.items()} for end in (0, -1)]

    def draw(self, trial: Trial) -> Build | dict[str, Any]:
        """What a trial is to try: an index with one query setting, or settings of a run."""
        if self._settings:
            return {name: domain.draw(trial, name) for name, domain in self._settings.items()}
        names = list(self._spaces)
        name = trial.suggest_categorical("retriever", names) if len(names) > 1 else names[0]
        # Arguments of one name may mean other things elsewhere: each index has its own.
        build, query = (
            {argument: domain.draw(trial, f"{name}.{argument}") for argument, domain in space.items()}
            for space in self._spaces[name]
        )
        return Build({"name": name, **build}, (query,))


def check_optuna() -> None:
    """Refuses to go on without Optuna.

    Raises:
        MissingLibraryError: It is not installed.
    """
    if find_spec("optuna") is None:
        raise MissingLibraryError("optuna", "pip install 'lightning-fot[optuna]'", "sweep.search")
