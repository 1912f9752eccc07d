"""Reads the command line and the YAML before anything heavy is imported, and finds what cannot work.

This is a light first pass: PyYAML and omegaconf only. jsonargparse then does the complete check, but it must import
torch and Lightning first, and by then a user with a typo in a path has waited for seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import re
import shlex
import shutil
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

from lightning_fot.config import CrossbatchConfig, EvaluationConfig, MemoryConfig
from lightning_fot.errors import MissingLibraryError, SettingError

SHIPPED = Path(__file__).parent / "configs"
OWN_KEYS = ("seed_everything", "trainer", "model", "data", "evaluation", "run_dir", "ckpt_path")
# The settings that a link fills from the model's: the user never sets them.
LINKS = {
    "model.backbone": "data.tokenizer",
    "model.memory.window": "data.window",
    "model.crossbatch.layout": "data.layout",
    "model.crossbatch.pack": "data.pack",
    "model.crossbatch.w": "data.prev_windows",
}
_OPTIONS_WITHOUT_VALUE = ("--print_config", "--help", "-h")
# Report, tables and metrics; checkpoints come on top (see `required_bytes`).
_RESULT_BYTES = 32 * 2**20


@dataclass
class Request:
    """A command line, read but not yet checked by jsonargparse.

    Attributes:
        verb: First word.
        configs: YAML files, in order.
        overrides: All other words, as given.
        settings: The files merged, with the overrides that this pass understands.
        notes: What to say on screen, such as which shipped configuration a name stands for.
        program: How the user called the program.
        config_words: The configurations as the user named them.
    """

    verb: str
    configs: list[Path]
    overrides: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    program: str = "lightning"
    config_words: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run: the first file's stem; a run folder's ``config.yaml`` has the folder's name."""
        if not self.configs:
            return "run"
        first = self.configs[0]
        name = first.resolve().parent.name if first.stem == "config" else first.stem
        return re.sub(r"-\d+$", "", name) if first.stem == "config" else name

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted setting, or the default."""
        node: Any = self.settings
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def command(self, **settings: object) -> str:
        """The command line that was given, with some settings replaced, ready to be pasted into a shell."""
        words = [*self.program.split(), self.verb]
        for word in self.config_words:
            words += ["--config", word]
        words += _without(self.overrides, settings)
        words += [f"--{key}={value}" for key, value in settings.items() if value is not None]
        return shlex.join(words)


def _without(overrides: Sequence[str], settings: Iterable[str]) -> list[str]:
    kept: list[str] = []
    names = {f"--{key}" for key in settings}
    skip = False
    for index, word in enumerate(overrides):
        if skip:
            skip = False
        elif word in names:
            skip = index + 1 < len(overrides) and not overrides[index + 1].startswith("--")
        elif word.split("=", 1)[0] not in names:
            kept.append(word)
    return kept


def close_match(word: str, choices: Iterable[str]) -> str:
    """``Did you mean X? `` or nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}? " if near else ""


def find_config(word: str) -> tuple[Path, str | None]:
    """The file that ``--config`` means.

    Args:
        word: A path, or the name of a YAML shipped in the package: ``hnsw``, ``hnsw.yaml``, ``configs/hnsw.yaml``.

    Returns:
        The path, and a line for the screen when it is a shipped one.

    Raises:
        SettingError: There is no such file.
    """
    path = Path(word).expanduser()
    if path.is_file():
        return path, None
    if path.is_dir():
        raise SettingError("config", word, "is a folder", "Give a YAML file.")
    stem = word.removeprefix("./").removeprefix("configs/")
    stem = stem.removesuffix(".yaml").removesuffix(".yml")
    shipped = SHIPPED / f"{stem}.yaml"
    if "/" not in stem and shipped.is_file():
        return shipped, f"No file {word} here: taking the configuration {stem!r} shipped with lightning-fot."
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    raise SettingError(
        "config", word, "no such file", f"{close_match(stem, names)}Give a path, or a shipped name: {', '.join(names)}."
    )


def read_request(verb: str, words: Sequence[str], program: str = "lightning") -> Request:
    """Splits a command line into configurations and overrides, and merges what it says.

    Raises:
        SettingError: A file is missing or not YAML, or a top-level key is unknown.
    """
    request = Request(verb, [], [], program=program)
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, _, value = word.partition("=")
        if name in ("--config", "-c"):
            if "=" not in word:
                if not pending:
                    raise SettingError("config", None, "no file given", f"Write: {program} {verb} --config hnsw")
                value = pending.pop(0)
            path, note = find_config(value)
            request.configs.append(path)
            request.config_words.append(value)
            if note:
                request.notes.append(note)
        else:
            request.overrides.append(word)
    _merge(request)
    return request


def _merge(request: Request) -> None:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.create({})
    for path in request.configs:
        try:
            loaded = OmegaConf.load(path)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise SettingError("config", str(path), f"is not valid YAML ({problem})", "Correct the file.") from error
        if not OmegaConf.is_dict(loaded):
            raise SettingError("config", str(path), "holds no settings", "Write keys such as model: and data:.")
        for section in ("trainer", "model", "model.memory", "model.crossbatch", "data", "evaluation"):
            _check_section(loaded, section)
        merged = _overlay(merged, loaded)
    for key, value in _assignments(request.overrides):
        OmegaConf.update(merged, key, value, merge=False, force_add=True)
    try:
        settings = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        key = str(getattr(error, "full_key", "") or "config")
        raise SettingError(key, "${...}", f"cannot be resolved: {problem}", "Correct the reference.") from error
    assert isinstance(settings, dict)
    request.settings = {str(key): value for key, value in settings.items()}


def _check_section(loaded: Any, section: str) -> None:
    """Refuses a list or a single value where settings belong, which could not be merged with anything."""
    node = loaded
    for part in section.split("."):
        if part not in node:
            return
        node = node[part]
        if node is not None and not isinstance(node, Mapping):
            raise SettingError(section, node, "must hold settings, not one value", f"Write {section}: with keys below.")
        if node is None:
            return


def _overlay(base: Any, top: Any) -> Any:
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(base, top)
    # A later file's retriever replaces the earlier one's: arguments of another backend make no sense.
    retriever = OmegaConf.select(top, "model.memory.retriever")
    if retriever is not None:
        OmegaConf.update(merged, "model.memory.retriever", retriever, merge=False)
    return merged


def _assignments(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    import yaml

    found: list[tuple[str, Any]] = []
    pending = list(overrides)
    while pending:
        word = pending.pop(0)
        name = word.partition("=")[0]
        if name in _OPTIONS_WITHOUT_VALUE:
            continue
        if not word.startswith("--"):
            raise SettingError("arguments", word, "is not understood", "Write settings as --key.sub=value.")
        if "=" in word:
            value = word.partition("=")[2]
        elif pending and not pending[0].startswith("--"):
            value = pending.pop(0)
        else:
            continue
        key = name[2:]
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\+?", key) or key.endswith("+"):
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        found.append((key, parsed))
    return found


def check_settings(request: Request) -> None:
    """Finds what cannot work, without torch: keys, ranges, retriever, backbone, layers, paths, checkpoint.

    Raises:
        SettingError: Something cannot work.
        MissingLibraryError: A library that the settings need is not installed.
    """
    _check_keys(request.settings, OWN_KEYS, "")
    here = Path(__file__).parent
    for section, source, owner in (
        ("model", here / "module.py", "FocusedTransformer"),
        ("data", here / "data" / "datamodule.py", "CrossbatchDataModule"),
        ("trainer", _library_file("lightning", "pytorch/trainer/trainer.py"), "Trainer"),
    ):
        _check_keys(request.get(section), _arguments(source, owner), section)
    for target in LINKS.values():
        if request.get(target) is not None:
            leader = next(key for key, value in LINKS.items() if value == target)
            raise SettingError(target, request.get(target), f"always follows {leader}", f"Set {leader} instead.")
    memory = _build(MemoryConfig, request, "model.memory")
    _build(CrossbatchConfig, request, "model.crossbatch")
    _build(EvaluationConfig, request, "evaluation")
    _check_retriever(memory.retriever)
    _check_backbone(str(request.get("model.backbone", "smollm2-135m")), memory)
    _check_paths(request)


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


def _check_retriever(spec: Any) -> None:
    from lightning_fot.retrievers.registry import check_retriever

    check_retriever(spec)


def _check_backbone(name: str, memory: MemoryConfig) -> None:
    from lightning_fot.pretrained import check_backbone

    info = check_backbone(name)
    if info.num_layers is not None:
        memory.resolve_layers(info.num_layers)


def _check_paths(request: Request) -> None:
    from lightning_fot.data.readers import check_paths

    for key in ("data.paths", "data.heldout"):
        paths = request.get(key)
        if paths is None:
            continue
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise SettingError(key, paths, "must be a list of paths", f"Write --{key}=[folder,file.txt].")
        if not paths:
            raise SettingError(key, paths, "is empty", "Name a folder or file, or leave it out.")
        check_paths(paths)


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
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or weights
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


def check_library(library: str, install: str, needed_for: str) -> None:
    """Checks that a library is installed, without importing it.

    Raises:
        MissingLibraryError: It is not.
    """
    if find_spec(library) is None:
        raise MissingLibraryError(library, install, needed_for)
