"""What users import, configure and type today goes on working; ``public.json`` lists it."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.retrievers import available_retrievers, create_retriever
from tests.compat import public

THEN: dict[str, Any] = json.loads(public.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", THEN["modules"])
def test_names_are_there_and_take_what_they_took(module: str) -> None:
    now = importlib.import_module(module)
    for name, then in THEN["modules"][module].items():
        found = public.described(getattr(now, name))
        if not isinstance(then, dict):
            assert _takes(found, then), f"{module}.{name} takes {found}, not {then}"
            continue
        for member, arguments in then.items():
            assert member in found, f"{module}.{name}.{member} is gone"
            assert _takes(found[member], arguments), f"{module}.{name}.{member} takes {found[member]}, not {arguments}"


def _takes(now: list[str] | None, then: list[str] | None) -> bool:
    """Whether all calls of then are calls of now, as far as names and order of arguments tell."""
    if then is None or now is None:
        return then is None
    # Behind all others stands **kwargs: a new argument comes before it.
    order = [name for name in then if name != "kwargs"]
    return [name for name in now if name != "kwargs"][: len(order)] == order and (
        "kwargs" in now or "kwargs" not in then
    )


@pytest.mark.parametrize("module", THEN["listed"])
def test_lists_of_names_are_complete(module: str) -> None:
    listed = importlib.import_module(module).__all__
    assert {name for name in THEN["modules"][module] if not name.isupper()} <= {*listed}
    assert set(listed) <= {*dir(importlib.import_module(module))}


def test_the_model_of_the_harness() -> None:
    assert find_spec(public.HARNESS["module"]) is not None
    pytest.importorskip(public.HARNESS["needs"])
    module = importlib.import_module(public.HARNESS["module"])
    assert all(hasattr(module, name) for name in public.HARNESS["names"])


@pytest.mark.parametrize("module", [name for name, heavy in THEN["loads"].items() if "torch" not in heavy])
def test_importing_loads_nothing_heavy_that_it_did_not_load(module: str, repository: Path) -> None:
    assert set(public.loads(f"import {module}", repository)) <= set(THEN["loads"][module])


@pytest.mark.parametrize("name", ["MemoryConfig", "CrossbatchConfig", "EvaluationConfig"])
def test_settings_are_made_without_torch(name: str, repository: Path) -> None:
    assert "torch" not in public.loads(f"import lightning_fot; lightning_fot.{name}()", repository)


def test_scripts(repository: Path) -> None:
    now = public.scripts(repository)
    assert now == THEN["scripts"]
    for target in now.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_verbs() -> None:
    assert set(THEN["verbs"]) <= set(public.verbs())


@pytest.mark.parametrize("verb", THEN["options"])
def test_options(verb: str) -> None:
    assert set(THEN["options"][verb]) <= set(public.options(verb))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("/" in name)) for name in THEN["settings"]]
)
def test_settings_of_shipped_configurations(name: str) -> None:
    assert set(THEN["settings"][name]) <= set(public.settings(name))


@pytest.mark.parametrize("section", THEN["schemas"])
def test_keys_of_settings(section: str) -> None:
    assert set(THEN["schemas"][section]) <= set(public.schemas()[section])


@pytest.mark.slow
def test_retrievers_of_other_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged.py").write_text(
        "from lightning_fot.retrievers import ExactRetriever\n\n\nclass Plugged(ExactRetriever):\n    pass\n",
        encoding="utf-8",
    )
    described = tmp_path / "plugged-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.2\n", encoding="utf-8")
    (described / "entry_points.txt").write_text(
        "[lightning_fot.retrievers]\nmine = plugged:Plugged\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    info = available_retrievers()["mine"]
    assert (info.source, info.version, info.importable) == ("plugged", "1.2", True)
    assert type(create_retriever("mine", dim=4)).__name__ == "Plugged"


@pytest.mark.parametrize("name", ["ExactRetriever", "FaissIVFRetriever", "HNSWRetriever"])
def test_retrievers_by_class_path(name: str) -> None:
    assert type(create_retriever(f"lightning_fot.retrievers.{name}", dim=4)).__name__ == name


@pytest.mark.parametrize("name", THEN["modules"]["lightning_fot.callbacks"])
def test_callbacks_by_class_path(name: str) -> None:
    words = ["run", "--config=smoke", f"--trainer.callbacks=lightning_fot.callbacks.{name}", "--print_config"]
    assert f"class_path: lightning_fot.callbacks.{name}" in public.command(*words)
