"""How many contexts a row is shown, over the course of training: constant, switched, or drawn for each step.

Start small: a model that is shown many contexts at once from the beginning ignores its previous window. The count is a
function of the settings, the optimiser step and the number of marks passed, so it is the same on every rank and after
resuming. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_fot.errors import SettingError

_KEY = "model.crossbatch.schedule"


@dataclass
class ScheduleConfig:
    """Counts of shown contexts over time: they take the place of ``d`` (``paper``) or ``range`` (``packed``).

    Args:
        kind: ``constant``: the one value; ``step``: the next value at each step of ``at``; ``metric``: the next value
            when the metric passes the next mark of ``at``, never back; ``draw``: one of the values for each optimiser
            step.
        values: Counts, the first at the start. ``draw``: each as likely as it is often named.
        at: ``step``: optimiser steps, rising, one fewer than values. ``metric``: as many marks.
        metric: ``metric``: name under which it is logged, such as ``val/ppl``. The one of rank 0 counts.
        passes: ``metric``: ``above`` or ``below`` the mark.
        hold: ``metric``: optimiser steps that each value lasts at least, so that one high value does not pass several
            marks at once; 0 for none.
        seed: ``draw``: other draws.

    Raises:
        SettingError: Settings do not fit together.

    Example:
        >>> paper_pg19 = ScheduleConfig("step", [2, 64], at=[450_000])
        >>> [paper_pg19.count(step) for step in (0, 449_999, 450_000)]
        [2, 2, 64]
    """

    kind: Literal["constant", "step", "metric", "draw"] = "constant"
    values: list[int] = field(default_factory=lambda: [1])
    at: list[float] = field(default_factory=list)
    metric: str | None = None
    passes: Literal["above", "below"] = "above"
    hold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("kind", ("constant", "step", "metric", "draw")), ("passes", ("above", "below"))):
            if getattr(self, name) not in choices:
                raise self._wrong(name, "is not known", f"Choose one of {', '.join(choices)}.")
        if not isinstance(self.values, list) or not self.values or not all(_whole(value) for value in self.values):
            raise self._wrong("values", "must be a list of whole numbers of at least 0", "Correct it.")
        if self.kind == "constant" and len(self.values) != 1:
            raise self._wrong("values", "a constant is one value", "Keep one, or choose kind step, metric or draw.")
        wanted = len(self.values) - 1 if self.kind in ("step", "metric") else 0
        if not isinstance(self.at, list) or len(self.at) != wanted or not all(_number(mark) for mark in self.at):
            raise self._wrong("at", f"needs {wanted} numbers with kind {self.kind}", "Name one for each change.")
        if self.kind == "step" and any(
            # jsonargparse makes 3.0 of the 3 in a file.
            not float(mark).is_integer() or mark <= before
            for before, mark in zip([0, *self.at], self.at, strict=False)
        ):
            raise self._wrong("at", "must be whole numbers, each larger than the one before", "Correct it.")
        if (self.metric is None) == (self.kind == "metric"):
            problem = "is what kind metric watches" if self.kind == "metric" else f"has no use with kind {self.kind}"
            raise self._wrong("metric", problem, "Name one with kind metric, and only then.")
        for name in ("hold", "seed"):
            if not _whole(getattr(self, name)):
                raise self._wrong(name, "must be a whole number of at least 0", "Correct it.")
        if self.hold and self.kind != "metric":
            raise self._wrong(
                "hold", f"has no use with kind {self.kind}", "Leave it out; with kind step, space the steps."
            )

    def _wrong(self, name: str, problem: str, fix: str) -> SettingError:
        return SettingError(f"{_KEY}.{name}", getattr(self, name), problem, fix)

    def count(self, step: int, stage: int = 0) -> int:
        """Shown contexts of an optimiser step.

        Args:
            step: Optimiser steps done.
            stage: ``metric``: marks passed so far, see :meth:`stage`.
        """
        if self.kind == "step":
            return self.values[sum(step >= mark for mark in self.at)]
        if self.kind == "metric":
            return self.values[stage]
        if self.kind == "draw":
            # A hash, not a generator: it has no state to resume, and is the same on every machine.
            digest = hashlib.blake2b(f"{self.seed}/{step}".encode(), digest_size=8).digest()
            return self.values[int.from_bytes(digest, "big") % len(self.values)]
        return self.values[0]

    def stage(self, stage: int, metrics: Mapping[str, Any], held: float = math.inf) -> int:
        """Marks passed, given those passed before and the values logged last.

        Args:
            stage: Marks passed before.
            metrics: Logged values by name.
            held: Optimiser steps since the last mark was passed, or since the start.

        Raises:
            SettingError: Validation has been logged, and the metric is not part of it.
        """
        if self.kind != "metric" or stage == len(self.at):
            return stage
        if self.metric not in metrics:
            space = str(self.metric).partition("/")[0] + "/"
            logged = sorted(name for name in metrics if name.startswith(space))
            # Other metrics may come later, from a callback that measures seldom.
            if space == "val/" and logged:
                raise self._wrong("metric", "is not logged", f"Logged in validation: {', '.join(logged)}.")
            return stage
        if held < self.hold:
            return stage
        value, last = float(metrics[str(self.metric)]), stage + 1 if self.hold else len(self.at)
        while stage < last and not math.isnan(value):
            mark = self.at[stage]
            if not (value > mark if self.passes == "above" else value < mark):
                break
            stage += 1
        return stage


def schedule_from(given: Any) -> ScheduleConfig | None:
    """A schedule from what a configuration file holds, a mapping; schedules and None stay.

    Raises:
        SettingError: It is something else, or has an unknown key.
    """
    if given is None or isinstance(given, ScheduleConfig):
        return given
    if not isinstance(given, Mapping):
        raise SettingError(_KEY, given, "is not a mapping", "Give kind, values and what the kind needs.")
    known = list(ScheduleConfig.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise SettingError(f"{_KEY}.{name}", given[name], "is not a setting", f"Known here: {', '.join(known)}.")
    return ScheduleConfig(**given)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
