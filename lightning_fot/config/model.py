"""The section ``model`` of a configuration: the arguments of ``FocusedTransformer``. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_fot.config.backbone import LoraSettings, RopeSettings
from lightning_fot.config.combinations import check_training
from lightning_fot.config.crossbatch import CrossbatchConfig
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.errors import check_choice


@dataclass
class ModelConfig:
    """Each as the argument of ``FocusedTransformer`` of that name, whose docstring says what they mean.

    ``optimizer`` and ``lr_scheduler`` name classes of other libraries: they are checked when those are loaded.

    Raises:
        SettingError: A value cannot work.
    """

    backbone: str = "smollm2-135m"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    crossbatch: CrossbatchConfig = field(default_factory=CrossbatchConfig)
    optimizer: Any = None
    lr_scheduler: Any = None
    trainable: Literal["memory_layers", "memory_attention", "from_first_memory_layer", "all"] = "memory_layers"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = None
    gradient_checkpointing: bool = False
    weight_decay_on: Literal["all", "matrices"] = "all"
    validation: Literal["single", "multi"] = "single"
    rope: RopeSettings | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("trainable", ("memory_layers", "memory_attention", "from_first_memory_layer", "all")),
            ("dtype", ("float32", "bfloat16")),
            ("weight_decay_on", ("all", "matrices")),
            ("validation", ("single", "multi")),
        ):
            check_choice(f"model.{name}", getattr(self, name), choices)
        self.memory = check_training(self.memory, self.crossbatch)
