"""How a backbone itself is changed before a memory is attached: adapters, and positions that reach further.

Plain dataclasses that import nothing heavy; each checks itself when made.
"""

from dataclasses import dataclass, field
from typing import Literal

from lightning_fot.errors import SettingError, check_at_least


@dataclass
class LoraSettings:
    """Low-rank adapters in place of whole weights (peft): of the blocks that ``model.trainable`` names.

    Args:
        rank: Columns of each factor.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Share of an adapter's inputs that is dropped in training.
        modules: Names of linear modules.

    Raises:
        SettingError: A value is out of its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        check_at_least("model.lora", self, 1, "rank")
        if not self.alpha > 0:
            raise SettingError("model.lora.alpha", self.alpha, "must be above 0", "16 is a good number.")
        if not 0 <= self.dropout < 1:
            raise SettingError("model.lora.dropout", self.dropout, "must lie in [0, 1)", "0.05 is a good number.")
        if not self.modules:
            raise SettingError("model.lora.modules", self.modules, "names no module", "Write [q_proj, k_proj].")


@dataclass
class RopeSettings:
    """How far a backbone's rotary positions are stretched, by transformers' formulas (docs/comparison_modes.md).

    Args:
        type: ``linear``: positions divided by ``factor`` (position interpolation, arXiv 2306.15595); ``ntk``: a larger
            base, so that slow rotations stretch by ``factor`` and fast ones hardly; ``dynamic``: the same, growing with
            the length of what is read, from the length of training on; ``yarn`` (arXiv 2309.00071).
        factor: How many times the length of training is to be reached.
        original_length: Tokens that the backbone was trained on; None takes its ``max_position_embeddings``.

    Raises:
        SettingError: A value is out of its range.
    """

    type: Literal["linear", "ntk", "dynamic", "yarn"] = "yarn"
    factor: float = 2.0
    original_length: int | None = None

    def __post_init__(self) -> None:
        if self.type not in ("linear", "ntk", "dynamic", "yarn"):
            raise SettingError("model.rope.type", self.type, "is not known", "Choose linear, ntk, dynamic or yarn.")
        # "not >=" also refuses nan.
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)) or not 1 <= self.factor < 1e6:
            raise SettingError("model.rope.factor", self.factor, "must be a number of at least 1", "Try 2.")
        check_at_least("model.rope", self, 1, "original_length")
