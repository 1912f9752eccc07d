"""Settings of crossbatch training: who sees whom (FoT paper section 3.2)."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_fot.config.schedule import ScheduleConfig, schedule_from
from lightning_fot.errors import SettingError, check_at_least


@dataclass
class CrossbatchConfig:
    """Who sees whom in training (fot-semantics: FoT paper section 3.2 and LongLLaMA's released recipe).

    Args:
        layout: ``packed``: one pass, row i sees rows before it (LongLLaMA); ``paper``: previous windows are embedded
            in a separate call and row i sees those of rows i ... i+d-1; ``previous_window``: an older word
            for ``model.memory.attending=previous_window`` with ``packed``.
        range: ``packed``: the most rows that a row sees.
        pack: Consecutive rows that are consecutive windows of one stream; not in ``paper``.
        stepping: ``packed``: rows early in a pack see fewer rows (the 3B recipe: (0,0), (1,1), (2,1), (3,0) positives
            and negatives).
        d: ``paper``: contexts a row sees, one of them its own.
        w: ``paper``: previous windows of each row.
        differentiable: Let gradients reach the shown keys and values (FoT); False detaches them (Memorizing
            Transformers, Transformer-XL).
        schedule: How ``range`` or ``d`` changes in training; None keeps it.
        across_ranks: In distributed training, whether rows also see windows of other ranks, with exact gradients: more
            negatives for the same batch on each. False shows the rank's own.

    Raises:
        SettingError: A value is out of its range.
    """

    layout: Literal["packed", "paper", "previous_window"] = "packed"
    range: int = 3
    pack: int = 4
    stepping: bool = True
    d: int = 2
    w: int = 1
    differentiable: bool = True
    schedule: ScheduleConfig | None = None
    across_ranks: bool = False

    def __post_init__(self) -> None:
        check_at_least("model.crossbatch", self, 1, "pack", "d", "w")
        check_at_least("model.crossbatch", self, 0, "range")
        if self.layout not in ("packed", "paper", "previous_window"):
            fix = "Choose packed, paper or previous_window."
            raise SettingError("model.crossbatch.layout", self.layout, "is not known", fix)
        self.schedule = schedule_from(self.schedule)
        if self.schedule is not None and self.layout == "paper" and min(self.schedule.values) < 1:
            key, values = "model.crossbatch.schedule.values", self.schedule.values
            raise SettingError(key, values, "d is at least 1", "A row sees its own context.")

    @property
    def rows_of_a_text(self) -> int:
        """Consecutive rows of a batch that are consecutive windows of one text."""
        return 1 if self.layout == "paper" else self.pack

    @property
    def most(self) -> int:
        """The most contexts that a row is ever shown."""
        if self.schedule is not None:
            return max(self.schedule.values)
        return self.d if self.layout == "paper" else self.range

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> "CrossbatchConfig":
        """Settings of published models, by name.

        ``longllama-3b``: LongLLaMA's released continued pretraining; rows of a pack see (positives, negatives) =
            (0, 0), (1, 1), (2, 1), (3, 0). Exact, but in the first pack of a batch, which has no rows before it.
        ``longllama-7b``: the released formula with range 7: (0, 0), (1, 2), (2, 4), (3, 4). The 7B model's own
            mixture is not in the released code, so that this is not said to reproduce it.
        ``pg19``: the paper's d, 2 until step 450,000, then 64.
        ``dictionary``: the paper's d, 1 until an accuracy of 98 % (logged as ``val/accuracy``), then 128.
        ``mixed``: d drawn from 2 and 128 for each step.

        Batches must have room: d is at most the rows of a batch, so give ``schedule`` smaller values for smaller ones.

        Args:
            name: One of these.
            changes: Settings that differ.

        Raises:
            SettingError: There is no such recipe.
        """
        recipes: dict[str, dict[str, Any]] = {
            "longllama-3b": {"layout": "packed", "range": 3, "pack": 4, "stepping": True},
            "longllama-7b": {"layout": "packed", "range": 7, "pack": 4, "stepping": True},
            "pg19": {"layout": "paper", "schedule": ScheduleConfig("step", [2, 64], at=[450_000])},
            "dictionary": {
                "layout": "paper",
                "schedule": ScheduleConfig("metric", [1, 128], at=[0.98], metric="val/accuracy"),
            },
            "mixed": {"layout": "paper", "schedule": ScheduleConfig("draw", [2, 128])},
        }
        if name not in recipes:
            raise SettingError("model.crossbatch", name, "is not a recipe", f"Choose one of {', '.join(recipes)}.")
        return cls(**{**recipes[name], **changes})
