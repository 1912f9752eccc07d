"""A search with Optuna (an extra) whose trials several processes share, and none is lost when one is killed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.sweep.grid import Build, digest
from lightning_fot.sweep.space import check_optuna

if TYPE_CHECKING:
    from lightning_fot.sweep.folder import SweepFolder
    from lightning_fot.sweep.space import SearchConfig

JOURNAL = "search.journal"
_SMALLEST = ("recall_worst_head",)


class Search:
    """The trials of a search.

    The study is named after what is searched, so that one storage may hold many, and a search of more trials goes on.
    Who works on a trial holds a claim in the folder. A trial whose process has gone is given back to the queue.

    Args:
        config: What is searched.
        folder: Of the sweep.
        identity: What the measurements depend on besides what is drawn.

    Raises:
        MissingLibraryError: Optuna is not installed.
        SettingError: The storage cannot be opened.
    """

    def __init__(self, config: SearchConfig, folder: SweepFolder, identity: Any) -> None:
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(logging.WARNING)
        self.config = config
        self.folder = folder
        own = {name: value for name, value in asdict(config).items() if name not in ("trials", "seed", "storage")}
        self.name = f"lightning-fot-{digest([own, identity])}"
        self._here = str(folder.path.resolve())
        self._study: Any = None
        try:
            with folder.turn("search"):
                self._study = optuna.create_study(
                    study_name=self.name,
                    storage=self._storage(),
                    directions=list(config.objectives.values()),
                    load_if_exists=True,
                )
        except Exception as error:
            # Anything: the storage may be a data base of any kind, each with errors of its own.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingError(
                "sweep.search.storage", config.storage, f"cannot be opened ({reason})", "Check it."
            ) from error

    def _storage(self) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if self.config.storage is not None:
            return self.config.storage
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(self.folder.path / JOURNAL)))

    @contextmanager
    def next(self) -> Iterator[tuple[Any, Build | dict[str, Any]] | None]:
        """A trial and what it is to try, ours for the block; None where all are done, or being done by others."""
        with ExitStack() as held:
            # One process at a time: none sees a trial that has no claim yet, and none counts one twice.
            with self.folder.turn("search"):
                trial = self._ask()
                if trial is not None:
                    drawn = self.config.draw(trial)
                    assert held.enter_context(self.folder.claim(self._claim(trial)))
            yield None if trial is None else (trial, drawn)

    def _ask(self) -> Any:
        from optuna.samplers import TPESampler

        running = self._give_back_abandoned()
        if self.ended + running >= self.config.trials:
            return None
        # Seeded by the trial's number: a sampler that is made again would draw its first values once more.
        self._study.sampler = TPESampler(seed=self.config.seed + len(self._trials()))
        trial = self._study.ask()
        trial.set_user_attr("folder", self._here)
        return trial

    def _give_back_abandoned(self) -> int:
        """Queues the trials of processes that have gone; the number of those that are being worked on here."""
        from optuna.trial import TrialState

        running = 0
        for trial in self._trials():
            # Those of another folder hold their claims there.
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("folder") != self._here:
                continue
            with self.folder.claim(self._claim(trial)) as gone:
                if gone:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                    self._study.enqueue_trial(trial.params)
            running += not gone
        return running

    def _claim(self, trial: Any) -> str:
        return f"{self.name}-{trial.number}"

    def _trials(self) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False)
        return trials

    @property
    def ended(self) -> int:
        """Trials that have an answer, or an error of their own."""
        return sum(_ended(trial) for trial in self._trials())

    def tell(self, trial: Any, measures: Mapping[str, Any]) -> None:
        """Ends a trial with what was measured.

        Raises:
            SettingError: A measure that is asked for is missing.
        """
        for name in (*self.config.objectives, *self.config.at_least, *self.config.at_most):
            if not isinstance(measures.get(name), int | float) or not math.isfinite(measures[name]):
                raise SettingError("sweep.search", name, "was not measured", f"There are: {', '.join(measures)}.")
        for name, bound in self.config.at_least.items():
            trial.set_constraint(f"{name} at least", bound - measures[name])
        for name, bound in self.config.at_most.items():
            trial.set_constraint(f"{name} at most", measures[name] - bound)
        trial.set_user_attr("measures", {name: value for name, value in measures.items() if value is not None})
        self._study.tell(trial, [measures[name] for name in self.config.objectives])

    def fail(self, trial: Any, error: str) -> None:
        """Ends a trial that cannot be measured: it counts, and is not tried again."""
        from optuna.trial import TrialState

        trial.set_user_attr("error", error)
        self._study.tell(trial, state=TrialState.FAIL)

    def drawn(self) -> list[Build | dict[str, Any]]:
        """What the trials with an answer have tried; builds that differ in their query alone are one."""
        from optuna.trial import FixedTrial, TrialState

        answered = [trial for trial in self._trials() if trial.state == TrialState.COMPLETE]
        found: list[Build | dict[str, Any]] = []
        for drawn in (self.config.draw(FixedTrial(trial.params)) for trial in answered):
            same = next((known for known in found if isinstance(drawn, Build) and _same_build(known, drawn)), None)
            if isinstance(same, Build) and isinstance(drawn, Build):
                query = (*same.query, *(asked for asked in drawn.query if asked not in same.query))
                found[found.index(same)] = Build(same.spec, query)
            elif drawn not in found:
                found.append(drawn)
        return found

    def results(self) -> dict[str, Any]:
        """For ``results.json``: all trials that have ended, and which of them no other beats."""
        objectives = self.config.objectives
        # Where there is little to choose from, Optuna draws the same again.
        best = {digest(trial.params): trial.number for trial in reversed(self._study.best_trials)}
        trials = [
            {
                "trial": trial.number,
                **trial.params,
                **{name: value for name, value in trial.user_attrs.get("measures", {}).items() if name in objectives},
                "error": trial.user_attrs.get("error"),
            }
            for trial in self._trials()
            if _ended(trial)
        ]
        return {
            "study": self.name,
            "objectives": objectives,
            "complete": self.ended >= self.config.trials,
            "trials": trials,
            "best": sorted(best.values()),
        }


def _ended(trial: Any) -> bool:
    from optuna.trial import TrialState

    return bool(trial.state == TrialState.COMPLETE or "error" in trial.user_attrs)


def _same_build(known: Build | dict[str, Any], drawn: Build) -> bool:
    return isinstance(known, Build) and known.spec == drawn.spec


def index_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a search knows of an index that was measured on several layers: means, and the worst head of all.

    ``speed`` is the time of exact search over the index's, both measured in turns: its geometric mean.

    Example:
        >>> rows = [{"recall": 0.8, "search_ms_p50": 1.0, "exact_ms_p50": 2.0}, {"recall": 1.0, "search_ms_p50": 1.0,
        ...         "exact_ms_p50": 8.0}]
        >>> found = index_measures(rows)
        >>> found["recall"], found["speed"]
        (0.9, 4.0)
    """
    from lightning_fot.sweep.space import INDEX_MEASURES

    found = {}
    for name in INDEX_MEASURES:
        values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if values:
            found[name] = min(values) if name in _SMALLEST else sum(values) / len(values)
    ratios = [row["exact_ms_p50"] / row["search_ms_p50"] for row in rows if "exact_ms_p50" in row]
    if ratios:
        found["speed"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found
