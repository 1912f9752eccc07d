"""Looks for the retriever and the settings that a memory layer is best searched with, on its recorded keys and queries.

One index serves all its query settings, so the settings of an index are looked for by bisection: recall and time both
rise with the one argument that says how much of the index is looked at. Backends are sifted by successive halving: all
with their default index on a part of the calibration queries, then the better half with more indexes on all of them.
Queries that nothing was chosen by tell what the choice is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from torch import Tensor

from lightning_fot.bench.goals import Choice, Goal, LayerKeys, Trial
from lightning_fot.bench.measure import BuiltRetriever, Truth, times
from lightning_fot.config.retriever import EXACT, RetrieverSpec
from lightning_fot.errors import SettingError

# The argument of each backend that says how much of the index is looked at.
LADDERS = {"faiss_ivf": "nprobe", "hnsw": "ef_search", "scann": "num_leaves_to_search"}
_LARGEST = 2048
# Calibration queries of a KV head that sifting takes; calls timed; trials that are timed side by side, and how often.
_SIFTING = 256
_CALLS = 6
_FINALISTS = 4
_ROUNDS = 3


def tune_layer(
    layer: LayerKeys,
    specs: Sequence[RetrieverSpec],
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

    def better(one: tuple[Trial, _Candidate]) -> tuple[float, ...]:
        return goal.order(one[0])

    found: list[tuple[Trial, _Candidate]] = []
    sifted: list[tuple[Trial, _Candidate]] = []
    for spec in specs:
        say(f"{_name(spec)}: its default index")
        candidate = _Candidate(spec, layer, k)
        if not candidate.built.facts()["index_used"]:
            continue  # Too few keys: it would search exactly, as another candidate does.
        if candidate.exact:
            found += candidate.look(judge)
        else:
            sifted.append(min(candidate.look(sifting), key=better))
    sifted = sorted(_timed_in_turns(sifted, len(sifted), sifting), key=better)
    for _, candidate in sifted[: math.ceil(len(sifted) / 2)]:
        say(f"{candidate.built.name}: all calibration queries")
        found += candidate.look(judge)
        for arguments in _other_indexes(candidate, layer.keys.shape[1]):
            say(f"{candidate.built.name}: {', '.join(f'{name}={value}' for name, value in arguments.items())}")
            found += _Candidate(_with(candidate.spec, arguments), layer, k).look(judge)
    if not found:
        raise SettingError("file", layer.name, "holds too few keys for any index", "Record more, or add exact search.")
    say("the best of them, once more")
    found = _timed_in_turns(sorted(found, key=better), _FINALISTS, judge)
    nearest, candidate = min(found, key=better)
    choice = Choice(layer, [trial for trial, _ in found], None, nearest)
    if goal.met(nearest):
        say(f"{nearest}: held-out queries")
        choice.chosen = nearest
        choice.heldout = candidate.judged(nearest, layer, k, batches)
    return choice


def _timed_in_turns(found: list[tuple[Trial, _Candidate]], count: int, judge: _Judge) -> list[tuple[Trial, _Candidate]]:
    """The same trials, the first ``count`` timed anew side by side: what else the machine does then meets all alike."""
    seconds: list[list[float]] = [[] for _ in found[:count]]
    for _ in range(_ROUNDS):
        for place, (trial, candidate) in enumerate(found[:count]):
            candidate.set(trial)
            seconds[place] += judge.seconds(candidate.built)
    timed = [
        (replace(trial, ms=1e3 * median(spent)), candidate)
        for (trial, candidate), spent in zip(found[:count], seconds, strict=True)
    ]
    return [*timed, *found[count:]]


class _Judge:
    """Measures settings on some queries."""

    def __init__(self, layer: LayerKeys, queries: Tensor, k: int, goal: Goal) -> None:
        self.queries = queries
        self.goal = goal
        self._truth = Truth(layer.keys, queries, k, layer.scale, layer.softcap)

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

    def __init__(self, spec: RetrieverSpec, layer: LayerKeys, k: int) -> None:
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
        scores = Truth(layer.keys, layer.heldout, k, layer.scale, layer.softcap).score(self.built.search(layer.heldout))
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
    for exponent in range(2 * int(math.log2(_LARGEST)) + 1):
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


def _name(spec: RetrieverSpec) -> str:
    named = spec.get("name") if isinstance(spec, Mapping) else spec
    return named if isinstance(named, str) else getattr(named, "__name__", "retriever")


def _given(spec: RetrieverSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"} if isinstance(spec, Mapping) else {}


def _with(spec: RetrieverSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    name = spec["name"] if isinstance(spec, Mapping) else spec
    return {"name": name, **_given(spec), **arguments}
