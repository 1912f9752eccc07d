"""The command line read without anything heavy: which configurations, which overrides, and what they say together.

PyYAML and omegaconf only; jsonargparse reads the same words again, completely, once torch is imported.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.system.package import shipped

SHIPPED = shipped("configs")
RETRIEVER = "model.memory.retriever"
_OPTIONS_WITHOUT_VALUE = ("--print_config", "--help", "-h")


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


def flat_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; an empty section is a value.

    Example:
        >>> flat_settings({"model": {"memory": {"top_k": 32}, "dtype": "float32"}})
        {'model.memory.top_k': 32, 'model.dtype': 'float32'}
    """
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat_settings(item, f"{prefix}.{key}".lstrip("."))
    return found


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
    if all(part.isidentifier() for part in stem.split("/")) and shipped.is_file():
        return shipped, f"No file {word} here: taking the configuration {stem!r} shipped with lightning-fot."
    names = sorted(str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml"))
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
        except RecursionError:
            raise SettingError("config", str(path), "is nested too deeply", "Correct the file.") from None
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise SettingError("config", str(path), f"is not valid YAML ({problem})", "Correct the file.") from error
        if not OmegaConf.is_dict(loaded):
            raise SettingError("config", str(path), "holds no settings", "Write keys such as model: and data:.")
        for section in ("trainer", "model", "model.memory", "model.crossbatch", "data", "evaluation"):
            _check_section(loaded, section)
        merged = _overlay(merged, loaded)
    _keep_index_size(request, OmegaConf.select(merged, f"{RETRIEVER}.min_index_size"))
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


def _keep_index_size(request: Request, size: int | None) -> None:
    """Lets a retriever that the command line names alone keep the file's ``min_index_size``.

    A file whose memories are smaller than the default size sets it so that an index is used at all; with another
    retriever in its place that still is what the file is for.
    """
    from lightning_fot.retrievers.registry import check_retriever

    names = [value for key, value in _assignments(request.overrides) if key == RETRIEVER]
    if size is None or not names or not isinstance(names[-1], str) or names[-1] == "exact":
        return
    spec = {"name": names[-1], "min_index_size": size}
    try:
        check_retriever(spec)
    except (SettingError, MissingLibraryError):
        return  # Not for us to say: a plug-in without this argument runs as it is, and a wrong name is refused later.
    request.overrides = [*_without(request.overrides, [RETRIEVER]), f"--{RETRIEVER}={json.dumps(spec)}"]
    request.notes.append(f"Retriever {names[-1]} keeps min_index_size={size} of the configuration.")


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
    retriever = OmegaConf.select(top, RETRIEVER)
    if retriever is not None:
        OmegaConf.update(merged, RETRIEVER, retriever, merge=False)
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
        except RecursionError:
            raise SettingError(key, f"{value[:40]}…", "is nested too deeply", "Correct it.") from None
        except yaml.YAMLError:
            parsed = value
        found.append((key, parsed))
    return found
