"""The command line read without anything heavy: which configurations, which overrides, and what they say together.

PyYAML and omegaconf only; jsonargparse reads the same words again, completely, once torch is imported.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fot.config.attending.base import SETTING
from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.request.words import Option, Verb, asks_for_itself, assignments, read
from lightning_fot.system.package import shipped

SHIPPED = shipped("configs")
RETRIEVER = "model.memory.retriever"
CONFIG = Option("config", "configuration: a shipped name or a YAML file", short="-c", many=True, metavar="NAME|FILE")


@dataclass
class Request:
    """A command line, read but not yet checked by jsonargparse.

    Attributes:
        verb: First word.
        configs: YAML files, in order.
        overrides: All other settings, each as ``--key=value``.
        settings: The files merged, with the overrides that this pass understands.
        notes: What to say on screen, such as which shipped configuration a name stands for.
        program: How the user called the command.
        config_words: The configurations as the user named them.
    """

    verb: str
    configs: list[Path]
    overrides: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    program: str = "lightning run"
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
        words = self.program.split()
        for word in self.config_words:
            words += ["--config", word]
        words += _without(self.overrides, *settings)
        words += [f"--{key}={value}" for key, value in settings.items() if value is not None]
        return shlex.join(words)


def _without(overrides: Sequence[str], *names: str) -> list[str]:
    """The overrides but those of these names."""
    return [word for word in overrides if word.removeprefix("--").partition("=")[0] not in names]


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


def read_request(verb: str, words: Sequence[str], program: str | None = None) -> Request:
    """Reads a command line of configurations and settings, and merges what it says.

    Args:
        verb: The command.
        words: Those after it.
        program: How the user called the command.

    Raises:
        SettingError: A word is not understood, or a file is missing or not YAML.
    """
    program = program or f"lightning {verb}"
    given = read(words, Verb(program, (CONFIG,), settings=("",)))
    return make_request(verb, given.options.config, given.settings, program)


def make_request(verb: str, configs: Sequence[str], overrides: Sequence[str], program: str) -> Request:
    """Merges configurations and settings.

    Args:
        verb: The command.
        configs: The configurations as the user named them.
        overrides: Settings, each as ``--key=value``.
        program: How the user called the command.

    Raises:
        SettingError: A file is missing or not YAML.
    """
    request = Request(verb, [], list(overrides), program=program, config_words=list(configs))
    for word in configs:
        path, note = find_config(word)
        request.configs.append(path)
        if note:
            request.notes.append(note)
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
    for key, value in _values(request.overrides):
        try:
            OmegaConf.update(merged, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, RecursionError) as error:
            # Such as a date, a list that holds itself, or half a reference.
            problem = "nested without end" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            raise SettingError(
                key, value if isinstance(value, str) else str(value)[:80], f"cannot be a setting ({problem})",
                "Give a number, true or false, a list, or a text in quotes.",
            ) from None  # fmt: skip
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

    names = [value for key, value in _values(request.overrides) if key == RETRIEVER]
    if size is None or not names or not isinstance(names[-1], str) or names[-1] == "exact":
        return
    spec = {"name": names[-1], "min_index_size": size}
    try:
        check_retriever(spec)
    except (SettingError, MissingLibraryError):
        return  # Not for us to say: a plug-in without this argument runs as it is, and a wrong name is refused later.
    request.overrides = [*_without(request.overrides, RETRIEVER), f"--{RETRIEVER}={json.dumps(spec)}"]
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
    # A later file's retriever replaces the earlier one's: arguments of another backend make no sense. So do ways of
    # attending.
    for key in (RETRIEVER, SETTING):
        chosen = OmegaConf.select(top, key)
        if chosen is not None:
            OmegaConf.update(merged, key, chosen, merge=False)
    return merged


def _values(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Settings with their values; what is added to a list, or asks jsonargparse for something, is left to that."""
    import yaml

    found: list[tuple[str, Any]] = []
    for key, text in assignments(overrides):
        if text is None or asks_for_itself(key) or key.endswith("+"):
            continue
        try:
            found.append((key, yaml.safe_load(text)))
        except RecursionError:
            raise SettingError(key, f"{text[:40]}…", "is nested too deeply", "Correct it.") from None
        except yaml.YAMLError:
            found.append((key, text))
    return found
