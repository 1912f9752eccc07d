"""The model of a named memory as a command line describes it: checked, without torch."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_fot.config.memory import OF_THE_MACHINE, MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.request.request import Request
from lightning_fot.request.sections import build
from lightning_fot.shards.engine import check_installed


@dataclass(frozen=True)
class ModelSettings:
    """The model of a memory.

    Args:
        backbone: As ``model.backbone``.
        memory: The fields of ``MemoryConfig``, all of them.
        dtype: Dtype of the weights.
        checkpoint: File with trained weights, None for the backbone's own.
    """

    backbone: str
    memory: dict[str, Any]
    dtype: str = "float32"
    checkpoint: str | None = None

    @property
    def config(self) -> MemoryConfig:
        """The memory settings, checked."""
        return MemoryConfig(**self.memory)

    def flat(self) -> dict[str, Any]:
        """Settings by the name that they have on the command line."""
        memory = {f"model.memory.{name}": value for name, value in self.memory.items() if name not in OF_THE_MACHINE}
        rest = {"model.backbone": self.backbone, "model.dtype": self.dtype, "ckpt_path": self.checkpoint}
        return {**rest, **memory}

    def check(self) -> None:
        """Checks, without torch, that the model can be opened.

        Raises:
            SettingError: The backbone or the checkpoint is not there, or settings do not fit.
            MissingLibraryError: A library that they need is not installed.
        """
        from lightning_fot.pretrained.backbones import check_backbone
        from lightning_fot.retrievers.registry import check_retriever

        config = self.config
        check_retriever(config.retriever)
        check_installed(config.sharding)
        layers = check_backbone(self.backbone).num_layers
        if layers is not None:
            config.resolve_layers(layers)
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise SettingError("ckpt_path", self.checkpoint, "no such file", "Put the checkpoint back there.")


def settings_of(request: Request) -> ModelSettings:
    """What a configuration and overrides say of the model, checked."""
    from lightning_fot.request.preflight import check_settings

    spoken = len(request.notes)
    check_settings(request)
    for note in request.notes[spoken:]:
        print(note, file=sys.stderr)
    return _model(request, request.get("model.memory") or {})


def settings_with(model: ModelSettings, request: Request) -> ModelSettings:
    """The settings of a memory with those that the command line names in their place."""
    from lightning_fot.request.preflight import check_settings

    memory = request.get("model.memory") or {}
    if not isinstance(memory, dict):
        raise SettingError("model.memory", memory, "must hold settings", "Write --model.memory.top_k=32.")
    own = {"backbone": model.backbone, "dtype": model.dtype, **(request.get("model") or {})}
    checked = _replaced(request, {**own, "memory": {**model.memory, **memory}})
    check_settings(checked)
    changed = _model(checked, checked.get("model.memory"))
    return changed if request.get("ckpt_path") is not None else replace(changed, checkpoint=model.checkpoint)


def _replaced(request: Request, model: dict[str, Any]) -> Request:
    """The request with another section ``model``."""
    return replace(request, settings={**request.settings, "model": model}, overrides=[], notes=[])


def _model(request: Request, memory: dict[str, Any]) -> ModelSettings:
    backbone = str(request.get("model.backbone", "smollm2-135m"))
    if Path(backbone).expanduser().is_dir():
        backbone = str(Path(backbone).expanduser().resolve())
    dtype = str(request.get("model.dtype", "float32"))
    checkpoint, rope = _checkpoint(request), request.get("model.rope")
    if rope is not None and checkpoint is None:
        # A checkpoint brings along the positions that it was trained with.
        raise SettingError(
            "model.rope", rope, "is applied by run and fit alone", "Give a checkpoint of that run, or leave it out."
        )
    return ModelSettings(backbone, asdict(build(MemoryConfig, memory, "model.memory")), dtype, checkpoint)


def _checkpoint(request: Request) -> str | None:
    word = request.get("ckpt_path")
    if word is None:
        return None
    path = Path(str(word)).expanduser()
    if word == "last":
        folder = request.configs[-1].parent if request.configs else Path()
        path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise SettingError(
            "ckpt_path", word, f"there is no file {path}", "Give a checkpoint, or last with a run folder's config.yaml."
        )
    return str(path.resolve())
