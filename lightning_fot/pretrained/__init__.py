"""Backbones and tokenizers by name: folders, hub ids, deltas, LongLLaMA, random architectures. Names load when used."""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.pretrained.backbones import NAMED_BACKBONES as NAMED_BACKBONES
    from lightning_fot.pretrained.backbones import SMOLLM2 as SMOLLM2
    from lightning_fot.pretrained.backbones import TINY as TINY
    from lightning_fot.pretrained.backbones import BackboneInfo as BackboneInfo
    from lightning_fot.pretrained.backbones import backbone_config as backbone_config
    from lightning_fot.pretrained.backbones import check_backbone as check_backbone
    from lightning_fot.pretrained.backbones import load_backbone as load_backbone
    from lightning_fot.pretrained.backbones import load_tokenizer as load_tokenizer
    from lightning_fot.pretrained.backbones import pretrained_file as pretrained_file

_HOME = {
    "BackboneInfo": "backbones",
    "NAMED_BACKBONES": "backbones",
    "SMOLLM2": "backbones",
    "TINY": "backbones",
    "backbone_config": "backbones",
    "check_backbone": "backbones",
    "load_backbone": "backbones",
    "load_tokenizer": "backbones",
    "pretrained_file": "backbones",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
