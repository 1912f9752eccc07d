"""Finds what cannot work before anything heavy is imported.

This is a light first pass. jsonargparse then does the complete check, but it must import torch and Lightning first, and
by then a user with a typo in a path has waited for seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from lightning_fot.config.attending.renamed import modernise
from lightning_fot.config.data import DataConfig
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.model import ModelConfig
from lightning_fot.config.run import LIGHTNING, LINKS, TRAINER, RunConfig
from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.request.request import Request, flat_settings
from lightning_fot.request.sections import build, check_names, unknown_setting
from lightning_fot.shards.engine import check_installed

# Verbs whose data are those of the section ``data``; others read the model's settings alone.
_JOBS = ("run", "fit", "validate", "test")
# What the weights of a model with its own memory settings were made for.
_TRAINED_FOR = ("memory_layers", "window", "positions", "distance", "attending")
_PATHS = ("data.paths", "data.heldout", "evaluation.distractor_paths", "evaluation.lookup.paths")
# Report, tables and metrics; checkpoints come on top (see `required_bytes`).
_RESULT_BYTES = 32 * 2**20


def check_settings(request: Request) -> None:
    """Finds what cannot work, without torch: keys, ranges, retriever, backbone, layers, paths, checkpoint.

    Memory settings that the request leaves open are added to it where the backbone has its own.

    Raises:
        SettingError: Something cannot work.
        MissingLibraryError: A library that the settings need is not installed.
    """
    from lightning_fot.retrievers.registry import check_retriever

    request.notes += modernise(request.settings)
    check_names(request.settings, RunConfig)
    _check_trainer(request.get("trainer"))
    for leader, target in LINKS.items():
        if request.get(target) is not None:
            raise SettingError(target, request.get(target), f"always follows {leader}", f"Set {leader} instead.")
    _check_lists(request)
    _check_numbers(request)
    _follow_backbone(request)
    memory = _build(request).model.memory
    check_retriever(memory.retriever)
    check_installed(memory.sharding)
    if request.get("model.lora") is not None and find_spec("peft") is None:
        raise MissingLibraryError("peft", "pip install 'lightning-fot[lora]'", "model.lora")
    _check_backbone(str(request.get("model.backbone", "smollm2-135m")), memory)
    _check_files(request)


def _build(request: Request) -> RunConfig:
    """The settings as dataclasses, which check themselves and each other."""
    settings = dict(request.settings)
    model = settings["model"] = build(ModelConfig, settings.get("model"), "model")
    data = settings.pop("data", None)
    if request.verb in _JOBS:
        linked = {
            target.removeprefix("data."): attrgetter(leader.removeprefix("model."))(model)
            for leader, target in LINKS.items()
        }
        settings["data"] = build(DataConfig, {**(data or {}), **linked}, "data")
    return build(RunConfig, settings)


def _check_trainer(given: object) -> None:
    """Refuses typing errors among the arguments of Lightning's Trainer, and leaves what a newer one has to it."""
    if not isinstance(given, Mapping):
        return
    newer = tuple(int(part) for part in version("lightning").split(".")[:2]) > LIGHTNING
    for name, value in given.items():
        if name not in TRAINER and close_match(str(name), TRAINER) and not newer:
            raise unknown_setting("trainer", str(name), value, TRAINER)


def _check_numbers(request: Request) -> None:
    """Refuses what is no number, and counts of the trainer that it divides by."""
    for key, value in flat_settings(request.settings).items():
        if isinstance(value, float) and math.isnan(value):
            raise SettingError(key, value, "is not a number", "Correct it.")
    for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps"):
        value = request.get(f"trainer.{name}")
        # Lightning's own 0 of the last one means never.
        least = 0 if name == "log_every_n_steps" else 1e-9
        if isinstance(value, int | float) and value < least:
            raise SettingError(f"trainer.{name}", value, "must be above 0", "Correct it, or leave it out.")


def _follow_backbone(request: Request) -> None:
    """Takes memory settings that are not set from a backbone that has its own, and says where set ones differ."""
    from lightning_fot.pretrained.backbones import backbone_config
    from lightning_fot.pretrained.longllama import is_longllama
    from lightning_fot.pretrained.memory_settings import pretrained_settings

    name = str(request.get("model.backbone", "smollm2-135m"))
    given = request.get("model.memory") or {}
    if not isinstance(given, Mapping):
        return
    settings = pretrained_settings(name, **given)
    taken = {key: value for key, value in settings.items() if key not in given}
    if taken:
        model = request.settings.setdefault("model", {})
        model["memory"] = {**given, **taken}
        request.overrides += [f"--model.memory.{key}={_word(value)}" for key, value in taken.items()]
        usual = dataclasses.asdict(MemoryConfig())
        told = {key: value for key, value in taken.items() if value != usual[key]}
        request.notes.append(f"Memory settings of {name}: {_listed(told) or 'the defaults'}.")
    try:
        own = pretrained_settings(name)
    except SettingError:
        return  # What is wrong with it has been replaced.
    other = {key: own[key] for key in _TRAINED_FOR if key in own and key in given and own[key] != given[key]}
    if other:
        here = _listed({key: given[key] for key in other})
        request.notes.append(f"{name} was made for {_listed(other)}; this run has {here}.")
    if own and is_longllama(backbone_config(name)):
        top_k = settings.get("top_k", MemoryConfig.top_k)
        request.notes.append(f"LongLLaMA's own code reads the whole memory; here a query reads the top_k={top_k} best.")


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _word(value: Any) -> str:
    """A setting as it stands on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _check_backbone(name: str, memory: MemoryConfig) -> None:
    from lightning_fot.pretrained.backbones import check_backbone

    info = check_backbone(name)
    if info.num_layers is not None:
        memory.resolve_layers(info.num_layers)


def _check_lists(request: Request) -> None:
    """Refuses lists of paths and of sources that are none, before anything is opened."""
    from lightning_fot.config.sources import check_taken, read_sources

    if request.get("data.sources") is not None:
        check_taken(request.get("data"), read_sources(request.get("data.sources")))
    for key in _PATHS:
        paths = _paths(request, key)
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise SettingError(key, paths, "must be a list of paths", f"Write --{key}=[folder,file.txt].")
        if not paths and request.get(key) is not None:
            raise SettingError(key, paths, "is empty", "Name a folder or file, or leave it out.")


def _check_files(request: Request) -> None:
    """Refuses files of text that are not there, or cannot be read."""
    from lightning_fot.data.mixture.check import check_sources
    from lightning_fot.data.text.readers import check_paths

    if request.get("data.sources") is not None:
        check_sources(request.get("data.sources"), request.get("data.text_field", "text"))
    for key in _PATHS:
        if request.get(key) is not None:
            check_paths(_paths(request, key), setting=key)


def _paths(request: Request, key: str) -> Any:
    """A list of paths; one that stands alone needs no brackets."""
    paths = request.get(key)
    return [] if paths is None else [paths] if isinstance(paths, str) else paths


def required_bytes(request: Request) -> int:
    """Room that a run needs on disk: results, and two checkpoints with their optimiser state when it trains."""
    if request.get("trainer.max_steps") == 0:
        return _RESULT_BYTES
    backbone = str(request.get("model.backbone", "smollm2-135m"))
    if backbone == "tiny-random-llama":
        return _RESULT_BYTES
    weights = 540 * 2**20  # SmolLM2 in float32
    folder = Path(backbone).expanduser()
    if folder.is_dir():
        files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
        weights = sum(file.stat().st_size for file in files) or weights
    # Weights and the two moments of Adam, for the last two checkpoints; less when only memory layers train.
    share = 1.0 if request.get("model.trainable") == "all" else 0.15
    return _RESULT_BYTES + int(2 * 3 * weights * share)


def check_folder(folder: Path, needed: int) -> None:
    """Checks that a run folder can be made and has room.

    Raises:
        SettingError: It cannot be written to, or the disk is too full.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise SettingError("run_dir", str(folder), f"{existing} is a file", "Give a folder.")
    if not os.access(existing, os.W_OK):
        raise SettingError("run_dir", str(folder), f"{existing} cannot be written to", "Give another folder.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SettingError(
            "run_dir",
            str(folder),
            f"needs about {needed / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free",
            "Make room, or give a folder on another disk.",
        )
