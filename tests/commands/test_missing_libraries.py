"""What is said where a library is missing: who needs it, which one, and the command that installs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_fot.cli import main
from lightning_fot.commands.bench.tune import _require_matplotlib
from lightning_fot.config.backbone import LoraSettings
from lightning_fot.config.memory import ShardSettings
from lightning_fot.config.sources import HuggingFaceSettings, missing_datasets
from lightning_fot.errors import MissingLibraryError
from lightning_fot.pretrained.backbones import check_backbone, load_backbone
from lightning_fot.report.drawing import figures
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import read_request
from lightning_fot.retrievers.optional import require
from lightning_fot.retrievers.registry import check_retriever
from lightning_fot.shards import engine
from lightning_fot.sweep.space import check_optuna
from lightning_fot.training.parameters import add_lora


def _datasets() -> None:
    raise missing_datasets(HuggingFaceSettings(setting="data.sources[0]", dataset="some/name"))


def _harness() -> None:
    main(["lm-eval", "--config", "smoke", "--tasks", "x", "--debug"])


# What needs it, the library, what installs it; and where it is asked for: find_spec of that module finds nothing, or
# the import fails.
CASES: list[tuple[Callable[[], object], str, str, str, str]] = [
    (lambda: add_lora(load_backbone("tiny-random-llama"), LoraSettings(), [1]), "", "model.lora", "peft",
     "pip install 'lightning-fot[lora]'"),
    (lambda: check_settings(read_request("run", ["--config", "smoke", "--model.lora={rank: 2}"])),
     "lightning_fot.request.preflight", "model.lora", "peft", "pip install 'lightning-fot[lora]'"),
    (check_optuna, "lightning_fot.sweep.space", "sweep.search", "optuna", "pip install 'lightning-fot[optuna]'"),
    (_require_matplotlib, "lightning_fot.commands.bench.tune", "--plot", "matplotlib", "pip install matplotlib"),
    (lambda: figures._figure(1, 1), "", "the report's figures", "matplotlib", "pip install matplotlib"),
    (lambda: check_retriever("hnsw"), "lightning_fot.retrievers.registry", "model.memory.retriever=hnsw", "hnswlib",
     "pip install hnswlib"),
    (lambda: require("scann", "scann", "scann"), "", "model.memory.retriever=scann", "scann", "pip install scann"),
    (lambda: check_backbone("smollm2-135m"), "lightning_fot.pretrained.backbones", "model.backbone=smollm2-135m", "",
     "pip install "),
    (_datasets, "", "data.sources[0] (kind huggingface)", "datasets", "pip install 'lightning-fot[datasets]'"),
    (lambda: main(["serve", "mine", "--debug"]), "lightning_fot.commands.serve", "lightning serve", "starlette",
     "pip install 'lightning-fot[serve]'"),
    (lambda: engine.check_installed(ShardSettings(2)), "lightning_fot.shards.engine", "model.memory.shards", "ray",
     "pip install 'lightning-fot[ray]'"),
    (engine.library, "", "model.memory.shards", "ray", "pip install 'lightning-fot[ray]'"),
    (_harness, "lightning_fot.commands.lm_eval", "lm-eval", "lm_eval", "pip install 'lightning-fot[lm-eval]'"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "module", "needs", "library", "install"), CASES, ids=[case[2] for case in CASES])
def test_a_missing_library_is_told(
    ask: Callable[[], object],
    module: str,
    needs: str,
    library: str,
    install: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if module:
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == library and name != "datasets"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library or "nothing", None)
    with pytest.raises(MissingLibraryError) as caught:
        ask()
    said = str(caught.value)
    assert re.match(rf"{re.escape(needs)} needs the library '{library}\w*', which cannot be imported", said), said
    assert re.search(rf"\. Run: {re.escape(install)}", said), said


def test_each_call_is_in_the_table() -> None:
    folder = Path(__file__).parents[2] / "lightning_fot"
    calls = {path.stem for path in folder.rglob("*.py") if "MissingLibraryError(" in path.read_text(encoding="utf-8")}
    assert calls == {
        "errors", "parameters", "preflight", "space", "tune", "figures", "registry", "optional", "backbones", "sources",
        "lm_eval", "serve", "engine",
    }  # fmt: skip
