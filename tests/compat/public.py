"""What users import, configure and type: collected from the package, kept in ``public.json``.

``make_fixtures.py`` writes the file; ``test_public_names.py`` holds the present package against it. Names may be added.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import yaml

from tests.compat.answers import command

FILE = Path(__file__).parent / "public.json"
# Modules that users import, as the documentation, the examples and the benchmarks do.
MODULES = (
    "lightning_fot",
    "lightning_fot.bench",
    "lightning_fot.callbacks",
    "lightning_fot.config",
    "lightning_fot.data",
    "lightning_fot.errors",
    "lightning_fot.memory",
    "lightning_fot.pretrained",
    "lightning_fot.report",
    "lightning_fot.retrievers",
    "lightning_fot.testing",
)
# This one needs the evaluation harness, an extra.
HARNESS = {"module": "lightning_fot.lm_eval_adapter", "needs": "lm_eval", "names": ["MemoryHarness"]}
# Constants that are used elsewhere; no rule finds them.
CONSTANTS = {"lightning_fot.bench": ["DEFAULT_QUERY_GRIDS"], "lightning_fot.pretrained": ["NAMED_BACKBONES"]}
HEAVY = ("torch", "lightning", "transformers", "matplotlib", "faiss", "hnswlib", "scann", "numpy")
VERBS = ("ask", "bench", "export", "ingest", "lm-eval", "report", "run", "sweep")
CONFIGS = Path("configs")


def collect(repository: Path) -> dict[str, Any]:
    """All of it, from the package that is imported."""
    return {
        "modules": {name: names(name) for name in MODULES},
        "listed": [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")],
        "loads": {name: loads(f"import {name}", repository) for name in MODULES},
        "scripts": scripts(repository),
        "verbs": verbs(),
        "options": {verb: options(verb) for verb in VERBS},
        "settings": {name: settings(name) for name in configs(repository)},
        "schemas": schemas(),
    }


def names(module: str) -> dict[str, Any]:
    """Public names of a module: its ``__all__``, or the classes and functions that it defines, and what they take."""
    found = importlib.import_module(module)
    listed = [name for name in getattr(found, "__all__", ()) if not name.startswith("_")]
    chosen = listed or sorted(name for name in vars(found) if _defined(found, name))
    return {name: described(getattr(found, name)) for name in [*chosen, *CONSTANTS.get(module, [])]}


def _defined(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    return bool(value.__module__ == module.__name__)


def described(value: Any) -> Any:
    """Arguments of a function; of a class those of its own public methods; None for anything else."""
    if inspect.isclass(value):
        # What Python gives protocols to be made with differs between its versions.
        found = {} if getattr(value, "_is_protocol", False) else {"__init__": _arguments(value)}
        for owner in reversed(value.__mro__):
            if owner.__module__.startswith("lightning_fot"):
                for name, member in vars(owner).items():
                    if not name.startswith("_"):
                        found[name] = _arguments(getattr(value, name)) if _called(member) else None
        return found
    return _arguments(value) if callable(value) else None


def _called(member: Any) -> bool:
    return inspect.isroutine(member) or isinstance(member, (staticmethod, classmethod))


def _arguments(function: Any) -> list[str] | None:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def loads(statement: str, folder: Path) -> list[str]:
    """Heavy libraries that a statement loads, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def scripts(repository: Path) -> dict[str, str]:
    """Scripts of the distribution, and what each calls."""
    import tomllib

    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["project"]["scripts"])


def verbs() -> list[str]:
    """The verbs that the help lists."""
    return re.findall(r"^  ([a-z-]+) {2,}\S", command("--help").partition("Examples:")[0], re.MULTILINE)


def options(verb: str) -> list[str]:
    """Options that the help of a verb names, but for those of Lightning's Trainer."""
    found = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", command(verb, "--help")))
    return sorted(word for word in found if not re.match(r"--trainer|--key|.*KEY", word))


def configs(repository: Path) -> list[str]:
    """The shipped configurations of ``run``; one that is laid over another brings it along."""
    folder = repository / CONFIGS
    found = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return [name for name in found if not name.startswith("sweeps/")]


def settings(name: str) -> list[str]:
    """Dotted keys of a configuration with its defaults, but for those that belong to Lightning or torch."""
    below = ["--config=exact"] if name == "paper/perplexity" else []
    return keys(yaml.safe_load(command("run", *below, f"--config={name}", "--print_config")))


def schemas() -> dict[str, list[str]]:
    """Dotted names of all fields of the settings that are dataclasses, those of their own settings included."""
    import lightning_fot.config as config

    return {name: fields(getattr(config, name)) for name in config.__all__}


def fields(kind: Any, prefix: str = "") -> list[str]:
    """Those of one dataclass."""
    found = []
    for name, hint in get_type_hints(kind).items():
        # Those too that are taken and not kept.
        if name not in kind.__dataclass_fields__:
            continue
        found.append(prefix + name)
        for part in [hint, *get_args(hint)]:
            if dataclasses.is_dataclass(part):
                found += fields(part, f"{prefix}{name}.")
    return sorted(found)


def keys(tree: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves of a tree of mappings and lists."""
    if prefix == "trainer" or prefix.endswith(".init_args"):
        return [prefix]
    if isinstance(tree, dict) and tree:
        return sorted({key for name, part in tree.items() for key in keys(part, f"{prefix}.{name}".lstrip("."))})
    if isinstance(tree, list) and any(isinstance(part, dict) for part in tree):
        return sorted({key for part in tree for key in keys(part, f"{prefix}[]")})
    return [prefix]


def write() -> None:
    """Keeps what is public today."""
    repository = Path(__file__).resolve().parents[2]
    text = json.dumps(collect(repository), indent=1)
    # Lists of words on one line each where they fit: a file to be read.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: _joined(match), text)
    FILE.write_text(text + "\n", encoding="utf-8")


def _joined(match: re.Match[str]) -> str:
    line = "[" + re.sub(r"\s+", " ", match[1]) + "]"
    return line if len(line) <= 100 else match[0]
