"""Looks for the retriever and the settings that a memory layer is best searched with, on its recorded keys and queries.

One index serves all its query settings, so the settings of an index are looked for by bisection: recall and time both
rise with the one argument that says how much of the index is looked at. Backends are sifted by successive halving: all
with their default index on a part of the calibration queries, then the better half with more indexes on all of them.
Queries that nothing was chosen by tell what the choice is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_fot.bench import BuiltRetriever, Truth, layer_of, scale_of, times
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.plan import MIN_INDEX_SIZE

EXACT = "exact"
# The argument that says how much is looked at, and the others that a query may set.
LADDERS = {"faiss_ivf": "nprobe", "hnsw": "ef_search", "scann": "num_leaves_to_search"}
_LONGEST_LADDER = 2048
_CALIBRATION = 1024
_SIFTING = 256
_CALLS = 6
_FINALISTS = 4
_ROUNDS = 3


@dataclass(frozen=True)
class Goal:
    """What is asked for, one of both.

    Args:
        recall: Least recall@k of every KV head; the fastest settings win.
        budget_ms: Most milliseconds of a call, all KV heads of a layer; the highest recall wins.
        batch: Queries a KV head in a call.
    """

    recall: float | None = None
    budget_ms: float | None = None
    batch: int = 512

    def met(self, trial: Trial) -> bool:
        """Whether a trial is good enough."""
        if self.recall is not None:
            return trial.worst_recall >= self.recall
        return self.budget_ms is None or trial.ms <= self.budget_ms

    def order(self, trial: Trial) -> tuple[float, ...]:
        """Sorts trials, the best first; those that do not meet the goal behind all that do."""
        if self.recall is not None:
            return (0, trial.ms) if self.met(trial) else (1, -trial.worst_recall)
        return (0, -trial.recall, trial.ms) if self.met(trial) else (1, trial.ms)


@dataclass(frozen=True)
class Trial:
    """One setting, measured on calibration queries.

    Args:
        name: The retriever.
        args: All its arguments that are not defaults, those of queries included.
        recall: Recall@k, mean over KV heads.
        worst_recall: Recall@k of the KV head where it is lowest.
        mass_recall: Softmax mass of what was found over that of the true k.
        ms: Median of a call.
        build_s: Seconds to build the index of all KV heads.
        bytes: Bytes of the index.
        queries: Queries a KV head that this was measured on.
    """

    name: str
    args: Mapping[str, Any]
    recall: float
    worst_recall: float
    mass_recall: float
    ms: float
    build_s: float
    bytes: int
    queries: int

    @property
    def spec(self) -> Any:
        """As ``MemoryConfig.retriever``."""
        return {"name": self.name, **self.args} if self.args else self.name

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.args.items())])


@dataclass
class LayerKeys:
    """Recorded keys and queries of one layer.

    Args:
        name: What it is called in messages.
        layer: Its number; None where the file does not say.
        keys: (G, n, D).
        calibration: (G, q, D) queries that settings are chosen by.
        heldout: (G, q', D) queries that come after them.
        past: (G, p, D) queries that an index may learn from.
        scale: Factor of the scores in the softmax; None means 1 / sqrt(D).
    """

    name: str
    layer: int | None
    keys: Tensor
    calibration: Tensor
    heldout: Tensor
    past: Tensor | None
    scale: float | None


@dataclass
class Choice:
    """What was found for a layer.

    Args:
        layer: Its keys and queries.
        trials: All settings that were tried on all calibration queries.
        chosen: The one to take; None where none meets the goal.
        nearest: The one that comes closest to the goal.
        heldout: Fields of a bench row of ``chosen`` on held-out queries, with ``worst_recall``; empty without one.
    """

    layer: LayerKeys
    trials: list[Trial]
    chosen: Trial | None
    nearest: Trial
    heldout: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Any:
        """The choice as ``MemoryConfig.retriever`` of its layer.

        Raises:
            ValueError: Nothing was chosen.
        """
        if self.chosen is None:
            raise ValueError(f"nothing was chosen for {self.layer.name}")
        if self.chosen.name == EXACT:
            return EXACT
        count = self.layer.keys.shape[1]
        # Below the keys that it was measured on, nothing is known of the index; the default size stands above.
        size = {"min_index_size": count} if count < MIN_INDEX_SIZE else {}
        return {"name": self.chosen.name, **self.chosen.args, **size}


def layers_of(recorded: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> list[LayerKeys]:
    """Puts the heads of each layer together and divides their queries, the earlier half to choose by.

    Args:
        recorded: As :func:`lightning_fot.bench.load_qk` gives it.
        metadata: As :func:`lightning_fot.bench.load_metadata` gives it.

    Raises:
        SettingError: The heads of a layer differ in size, or there are too few queries to divide.
    """
    groups: dict[str, list[str]] = {}
    for name in recorded:
        layer = layer_of(name)
        groups.setdefault(name if layer is None else f"layer {layer}", []).append(name)
    found = []
    for title, names in groups.items():
        heads = [recorded[name] for name in names]
        shapes = {tuple((kind, tuple(part.shape[1:])) for kind, part in sorted(head.items())) for head in heads}
        if len(shapes) > 1:
            raise SettingError("file", ", ".join(names), "differ in size", "Record the heads of a layer together.")
        whole = {kind: torch.cat([head[kind] for head in heads]) for kind in heads[0] if kind != "positions"}
        half = whole["queries"].shape[1] // 2
        if not half:
            raise SettingError("file", title, "has too few queries to choose and to judge by", "Record more.")
        # Spread over the half, so that few of them still come from several windows.
        places = torch.linspace(0, half - 1, min(half, _CALIBRATION)).round().long()
        found.append(
            LayerKeys(
                title,
                layer_of(names[0]),
                whole["keys"],
                whole["queries"][:, places],
                whole["queries"][:, half:],
                whole.get("past_queries"),
                scale_of(names[0], metadata),
            )
        )
    return found


def tune_layer(
    layer: LayerKeys,
    specs: Sequence[Any],
    k: int,
    goal: Goal,
    batches: Sequence[int] = (1, 512),
    say: Callable[[str], None] = lambda what: None,
) -> Choice:
    """Looks for the best settings of a layer.

    Args:
        layer: Its keys and queries.
        specs: Retrievers to choose from; arguments that are given stay as they are.
        k: Neighbours wanted.
        goal: What is asked for.
        batches: Batch sizes with which the choice is timed on held-out queries.
        say: Told what is tried next.

    Returns:
        The choice, with everything that was tried.
    """
    sample = layer.calibration[:, :: max(1, layer.calibration.shape[1] // _SIFTING)]
    sifting = _Judge(layer, sample, k, goal)
    judge = _Judge(layer, layer.calibration, k, goal)
    found: list[tuple[Trial, _Candidate]] = []
    sifted: list[tuple[tuple[float, ...], _Candidate]] = []
    for spec in specs:
        say(f"{_name(spec)}: its default index")
        candidate = _Candidate(spec, layer, k)
        if not candidate.built.facts()["index_used"]:
            continue  # Too few keys: it would search exactly, as another candidate does.
        if candidate.exact:
            found += candidate.look(judge)
        else:
            sifted.append((min(goal.order(trial) for trial, _ in candidate.look(sifting)), candidate))
    sifted.sort(key=lambda one: one[0])
    del sifted[math.ceil(len(sifted) / 2) :]
    for _, candidate in sifted:
        say(f"{candidate.built.name}: all calibration queries")
        found += candidate.look(judge)
        for arguments in _other_indexes(candidate, layer.keys.shape[1]):
            say(f"{candidate.built.name}: {', '.join(f'{name}={value}' for name, value in arguments.items())}")
            found += _Candidate(_with(candidate.spec, arguments), layer, k).look(judge)
    if not found:
        raise SettingError("file", layer.name, "holds too few keys for any index", "Record more, or add exact search.")
    say("the best of them, once more")
    found = _timed_in_turns(sorted(found, key=lambda one: goal.order(one[0])), judge)
    nearest, candidate = min(found, key=lambda one: goal.order(one[0]))
    choice = Choice(layer, [trial for trial, _ in found], None, nearest)
    if goal.met(nearest):
        say(f"{nearest}: held-out queries")
        choice.chosen = nearest
        choice.heldout = candidate.judged(nearest, layer, k, batches)
    return choice


def _timed_in_turns(found: list[tuple[Trial, _Candidate]], judge: _Judge) -> list[tuple[Trial, _Candidate]]:
    """The same trials, the first few timed anew side by side: what else the machine does then meets all of them."""
    seconds: list[list[float]] = [[] for _ in found[:_FINALISTS]]
    for _ in range(_ROUNDS):
        for place, (trial, candidate) in enumerate(found[:_FINALISTS]):
            candidate.set(trial)
            seconds[place] += judge.seconds(candidate.built)
    timed = [
        (replace(trial, ms=1e3 * median(spent)), candidate)
        for (trial, candidate), spent in zip(found[:_FINALISTS], seconds, strict=True)
    ]
    return [*timed, *found[_FINALISTS:]]


class _Judge:
    """Measures settings on some queries."""

    def __init__(self, layer: LayerKeys, queries: Tensor, k: int, goal: Goal) -> None:
        self.queries = queries
        self.goal = goal
        self._truth = Truth(layer.keys, queries, k, layer.scale)

    def seconds(self, built: BuiltRetriever) -> list[float]:
        """Seconds of calls as the goal has them."""
        return built.time(self.queries, _CALLS if self.goal.batch > 1 else 10 * _CALLS, self.goal.batch)

    def measure(self, built: BuiltRetriever, args: Mapping[str, Any]) -> Trial:
        """Recall and time of an index as it is set; ``args`` say how."""
        scores = self._truth.score(built.search(self.queries))
        means, facts = scores.means(), built.facts()
        return Trial(
            built.name,
            dict(args),
            means["recall"],
            scores.worst_recall(),
            means["mass_recall"],
            1e3 * median(self.seconds(built)),
            facts["build_s"],
            facts["bytes"],
            self.queries.shape[1],
        )


class _Candidate:
    """A built index, whose query settings are looked for."""

    def __init__(self, spec: Any, layer: LayerKeys, k: int) -> None:
        self.spec = spec
        given = {} if _name(spec) == EXACT or "min_index_size" in _given(spec) else {"min_index_size": 1}
        self.built = BuiltRetriever(spec, layer.keys, layer.past, k, **given)
        self.exact = self.built.retriever.exact
        self._ladder = list(_ladder(self.built, _given(spec), k, layer.keys.shape[1]))
        self._start = 0
        if self._ladder:
            wanted = getattr(self.built.retriever, self._argument) or self._ladder[len(self._ladder) // 2]
            self._start = min(range(len(self._ladder)), key=lambda place: abs(self._ladder[place] - wanted))

    @property
    def _argument(self) -> str:
        return LADDERS.get(self.built.name) or next(iter(self.built.retriever.query_args), "")

    def set(self, trial: Trial) -> None:
        """Sets the index as a trial had it."""
        self.built.set({name: value for name, value in trial.args.items() if name in self.built.retriever.query_args})

    def look(self, judge: _Judge) -> list[tuple[Trial, _Candidate]]:
        """Trials on the way to the least setting that reaches the recall, or the largest within the budget."""
        if not self._ladder:
            return [(judge.measure(self.built, _given(self.spec)), self)]
        seen: dict[int, Trial] = {}

        def beyond(place: int) -> bool:
            """Whether a place is at or above the step from too little recall to enough, or into too much time."""
            if place not in seen:
                setting = {self._argument: self._ladder[place]}
                self.built.set(setting)
                seen[place] = judge.measure(self.built, {**_given(self.spec), **setting})
            return judge.goal.met(seen[place]) is (judge.goal.recall is not None)

        self._start = first_beyond(beyond, len(self._ladder), self._start)
        self._start = min(self._start, len(self._ladder) - 1)
        return [(trial, self) for trial in seen.values()]

    def judged(self, trial: Trial, layer: LayerKeys, k: int, batches: Sequence[int]) -> dict[str, Any]:
        """A trial's setting on held-out queries."""
        self.set(trial)
        scores = Truth(layer.keys, layer.heldout, k, layer.scale).score(self.built.search(layer.heldout))
        calls = [
            {
                "batch": batch,
                **times(
                    self.built.time(layer.heldout, _ROUNDS * (_CALLS if batch > 1 else 10 * _CALLS), batch),
                    batch * layer.keys.shape[0],
                ),
            }
            for batch in batches
        ]
        return {
            **self.built.facts(),
            **scores.means(),
            "worst_recall": scores.worst_recall(),
            "queries": layer.heldout.shape[1],
            "calls": calls,
        }


def first_beyond(beyond: Callable[[int], bool], count: int, start: int) -> int:
    """First of the places 0 … count-1 at which a monotone condition holds; ``count`` where it nowhere does.

    Steps away from ``start`` double, so that far ends, which are slow to measure, are asked only when they matter.
    """
    low, high, step = -1, count, 1
    place = start
    while low + 1 < high:
        if beyond(place):
            high = place
            place = max(low + 1, place - step) if low < 0 else (low + high) // 2
        else:
            low = place
            place = min(high - 1, place + step) if high == count else (low + high) // 2
        step *= 2
    return high


def _ladder(built: BuiltRetriever, given: Mapping[str, Any], k: int, keys: int) -> Iterator[int]:
    """Values of the argument that says how much is looked at, in steps of a square root of 2; none to look for."""
    arguments = built.retriever.query_args
    argument = LADDERS.get(built.name) or next(iter(arguments), "")
    # Plug-ins may have arguments of any kind: only numbers are understood.
    if argument not in arguments or argument in given:
        return
    if built.name not in LADDERS and type(getattr(built.retriever, argument)) is not int:
        return
    least = k if argument == "ef_search" else 1
    last = 0
    for exponent in range(2 * int(math.log2(_LONGEST_LADDER)) + 1):
        value = round(2 ** (exponent / 2))
        if least <= value <= max(least, keys) and value != last:
            last = value
            yield value


def _other_indexes(candidate: _Candidate, keys: int) -> list[dict[str, Any]]:
    """Build arguments worth trying beside the default, where they are not given."""
    given = _given(candidate.spec)
    cells = {
        name: 2 ** round(math.log2(factor * math.sqrt(keys))) for name, factor in (("nlist", 6), ("num_leaves", 3))
    }
    others = {
        "faiss_ivf": [{"nlist": cells["nlist"]}],
        "hnsw": [{"M": 32}],
        "scann": [{"num_leaves": cells["num_leaves"]}, {"reorder": 512}],
    }.get(candidate.built.name, [])
    return [one for one in others if not one.keys() & given.keys()]


def _name(spec: Any) -> str:
    named = spec.get("name") if isinstance(spec, Mapping) else spec
    return named if isinstance(named, str) else getattr(named, "__name__", "retriever")


def _given(spec: Any) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"} if isinstance(spec, Mapping) else {}


def _with(spec: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    name = spec["name"] if isinstance(spec, Mapping) else spec
    return {"name": name, **_given(spec), **arguments}
