"""Finds what cannot work before anything heavy is imported.

This is a light first pass. jsonargparse then does the complete check, but it must import torch and Lightning first, and
by then a user with a typo in a path has waited for seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import os
import shutil
import types
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

from lightning_fot.config.backbone import RopeSettings
from lightning_fot.config.combinations import check_training
from lightning_fot.config.crossbatch import CrossbatchConfig
from lightning_fot.config.evaluation import EvaluationConfig
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import SettingError, close_match
from lightning_fot.request.request import Request, flat_settings
from lightning_fot.system.package import shipped

OWN_KEYS = ("seed_everything", "trainer", "model", "data", "evaluation", "run_dir", "ckpt_path")
# The settings that a link fills from the model's: the user never sets them.
LINKS = {
    "model.backbone": "data.tokenizer",
    "model.memory.window": "data.window",
    "model.crossbatch.layout": "data.layout",
    "model.crossbatch.pack": "data.pack",
    "model.crossbatch.w": "data.prev_windows",
}
# What the weights of a model with its own memory settings were made for.
_TRAINED_FOR = ("memory_layers", "window", "positions", "integration", "segments", "dilations")
# Report, tables and metrics; checkpoints come on top (see `required_bytes`).
_RESULT_BYTES = 32 * 2**20


def check_settings(request: Request) -> None:
    """Finds what cannot work, without torch: keys, ranges, retriever, backbone, layers, paths, checkpoint.

    Memory settings that the request leaves open are added to it where the backbone has its own.

    Raises:
        SettingError: Something cannot work.
        MissingLibraryError: A library that the settings need is not installed.
    """
    _check_keys(request.settings, OWN_KEYS, "")
    for section, source, owner in (
        ("model", shipped("training", "module.py"), "FocusedTransformer"),
        ("data", shipped("data", "datamodule.py"), "CrossbatchDataModule"),
        ("trainer", _library_file("lightning", "pytorch/trainer/trainer.py"), "Trainer"),
    ):
        _check_keys(request.get(section), _arguments(source, owner), section)
    for target in LINKS.values():
        if request.get(target) is not None:
            leader = next(key for key, value in LINKS.items() if value == target)
            raise SettingError(target, request.get(target), f"always follows {leader}", f"Set {leader} instead.")
    _check_numbers(request)
    _follow_backbone(request)
    memory = _build(MemoryConfig, request, "model.memory")
    check_training(memory, _build(CrossbatchConfig, request, "model.crossbatch"))
    _build(RopeSettings, request, "model.rope")
    evaluation = _build(EvaluationConfig, request, "evaluation")
    evaluation.check_readings(memory)
    for task in evaluation.tasks:
        task.check(memory.window)
    _check_retriever(memory.retriever)
    _check_backbone(str(request.get("model.backbone", "smollm2-135m")), memory)
    _check_paths(request)


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
    _check_keys(given, [item.name for item in dataclasses.fields(MemoryConfig)], "model.memory")
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


def _library_file(library: str, path: str) -> Path | None:
    spec = find_spec(library)
    return Path(spec.origin).parent / path if spec is not None and spec.origin else None


def _arguments(source: Path | None, owner: str) -> tuple[str, ...]:
    """Names of a class's constructor arguments, read from its source: importing it would import torch.

    Empty where the source cannot tell; jsonargparse then does the check alone.
    """
    if source is None or not source.is_file():
        return ()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return tuple(argument.arg for argument in (*item.args.args[1:], *item.args.kwonlyargs))
    return ()


def _check_keys(given: Any, known: Sequence[str], prefix: str) -> None:
    if not isinstance(given, Mapping) or not known:
        return
    # `class_path` and `init_args` belong to subclasses, which only jsonargparse can check.
    if "class_path" in given:
        return
    for key in given:
        if key not in known:
            raise unknown_setting(
                f"{prefix}.{key}".lstrip("."), given[key], [f"{prefix}.{k}".lstrip(".") for k in known]
            )


def unknown_setting(key: str, value: object, known: Sequence[str]) -> SettingError:
    """The error for a setting that does not exist."""
    return SettingError(
        key, value, "is not a known setting", f"{close_match(key, known)}Known here: {', '.join(known)}."
    )


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value can be meant for a simple annotation; generous where jsonargparse knows better."""
    origin = get_origin(annotation)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is bool:
        return isinstance(value, bool)
    if origin is list:
        return isinstance(value, list)
    if origin in (types.UnionType,):
        return any(_fits(value, option) for option in get_args(annotation))
    if annotation in (None, type(None)):
        return value is None
    return True


def _build(kind: Any, request: Request, key: str) -> Any:
    """The dataclass of a section, made from what is set: it checks ranges itself."""
    given = request.get(key)
    if given is None:
        return kind()
    if not isinstance(given, Mapping):
        raise SettingError(key, given, "must hold settings", f"Write them below {key}, or as --{key}.NAME=VALUE.")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    _check_keys(given, list(fields), key)
    for name, value in given.items():
        annotation = fields[name].type
        if not _fits(value, annotation):
            wanted = getattr(annotation, "__name__", str(annotation))
            if get_origin(annotation) is not None:
                wanted = str(annotation)
            raise SettingError(f"{key}.{name}", value, f"must be of type {wanted}", "Correct it.")
    return kind(**given)


def _check_retriever(spec: RetrieverSpec) -> None:
    from lightning_fot.retrievers.registry import check_retriever

    check_retriever(spec)


def _check_backbone(name: str, memory: MemoryConfig) -> None:
    from lightning_fot.pretrained.backbones import check_backbone

    info = check_backbone(name)
    if info.num_layers is not None:
        memory.resolve_layers(info.num_layers)


def _check_paths(request: Request) -> None:
    from lightning_fot.config.sources import check_taken, read_sources
    from lightning_fot.data.mixture.check import check_sources
    from lightning_fot.data.text.readers import check_paths

    if request.get("data.sources") is not None:
        check_taken(request.get("data"), read_sources(request.get("data.sources")))
        check_sources(request.get("data.sources"), request.get("data.text_field", "text"))
    for key in ("data.paths", "data.heldout", "evaluation.distractor_paths"):
        paths = request.get(key)
        if paths is None:
            continue
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise SettingError(key, paths, "must be a list of paths", f"Write --{key}=[folder,file.txt].")
        if not paths:
            raise SettingError(key, paths, "is empty", "Name a folder or file, or leave it out.")
        check_paths(paths, setting=key)


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
