"""What the tuner is given, and what it gives: keys by layer, a goal, trials, and a choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fot.bench.measure import layer_of, scale_of, softcap_of
from lightning_fot.config.retriever import EXACT, MIN_INDEX_SIZE
from lightning_fot.errors import SettingError

# Queries of a KV head that settings are chosen by: recall is then known to about half a per cent.
_CALIBRATION = 1024


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
        softcap: Soft cap of the scores in the softmax; None means none.
    """

    name: str
    layer: int | None
    keys: Tensor
    calibration: Tensor
    heldout: Tensor
    past: Tensor | None
    scale: float | None
    softcap: float | None = None


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
                softcap_of(names[0], metadata),
            )
        )
    return found
