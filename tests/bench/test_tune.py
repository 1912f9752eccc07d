"""The tuner: what it chooses reaches what was asked for, on queries that it did not choose by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.bench.goals import Goal, LayerKeys, layers_of
from lightning_fot.bench.tune import first_beyond, tune_layer
from lightning_fot.cli import main
from lightning_fot.config.retriever import index_size, layer_spec, retriever_label
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_backbone
from lightning_fot.retrievers import check_retriever, create_retriever
from lightning_fot.testing import real_qk


def test_first_beyond_finds_every_step_from_everywhere() -> None:
    for count in range(1, 14):
        for step in range(count + 1):
            for start in range(count):
                asked: list[int] = []

                def beyond(place: int, step: int = step, asked: list[int] = asked) -> bool:
                    asked.append(place)
                    return place >= step

                assert first_beyond(beyond, count, start) == step
                assert len(asked) == len(set(asked)) <= 8
                assert set(asked) <= set(range(count))
                # The answer was seen, and so was the place before it.
                assert {place for place in (step - 1, step) if 0 <= place < count} <= set(asked)


KEYS, QUERIES = 2048, 96


def some(name: str) -> dict[str, Tensor]:
    """The first of the real keys of a head, and of its queries."""
    sizes = {"keys": KEYS, "queries": QUERIES, "past_queries": 512}
    return {kind: part[:, : sizes[kind]] for kind, part in real_qk()[name].items()}


def real_layer(name: str) -> LayerKeys:
    (layer,) = layers_of({name: some(name)}, {})
    return layer


def recall_by_hand(layer: LayerKeys, spec: Any, queries: Tensor, k: int) -> float:
    """Share of the k best of each query that a retriever finds, by brute force over sets of rows."""
    retriever = create_retriever(spec, layer.keys.shape[-1], len(layer.keys))
    if layer.past is not None:
        retriever.observe(layer.past)
    retriever.add(layer.keys)
    retriever.flush()
    assert int(retriever.indexed.min()) == layer.keys.shape[1]
    found = retriever.search(queries, k)
    best = (queries.double() @ layer.keys.double().transpose(1, 2)).topk(k, dim=-1).indices
    hits = [
        len(set(a) & set(b)) for a, b in zip(found.flatten(0, 1).tolist(), best.flatten(0, 1).tolist(), strict=True)
    ]
    return sum(hits) / (k * len(hits))


def test_the_least_setting_that_reaches_the_recall_is_chosen() -> None:
    layer = real_layer("L10h0")
    spec = {"name": "faiss_ivf", "nlist": 48}
    choice = tune_layer(layer, [spec], 32, Goal(recall=0.95, batch=64), batches=(1, 64))
    assert choice.chosen is not None
    assert choice.chosen.worst_recall >= 0.95
    below = [trial for trial in choice.trials if trial.args["nprobe"] < choice.chosen.args["nprobe"]]
    assert below
    assert all(trial.worst_recall < 0.95 for trial in below)
    assert all(trial.args["nlist"] == 48 for trial in choice.trials)
    assert max(trial.args["nprobe"] for trial in below) > choice.chosen.args["nprobe"] / 1.6
    # What is quoted is what a retriever of that specification finds on the other queries.
    assert layer.calibration.shape[1] + layer.heldout.shape[1] == QUERIES
    torch.testing.assert_close(layer.heldout, some("L10h0")["queries"][:, -layer.heldout.shape[1] :])
    assert choice.spec["min_index_size"] == layer.keys.shape[1]
    assert choice.heldout["recall"] == pytest.approx(recall_by_hand(layer, choice.spec, layer.heldout, 32), abs=1e-3)
    assert choice.chosen.recall == pytest.approx(recall_by_hand(layer, choice.spec, layer.calibration, 32), abs=1e-3)
    assert [call["batch"] for call in choice.heldout["calls"]] == [1, 64]


def test_a_budget_takes_the_best_recall_within_it() -> None:
    layer = real_layer("L20h1")
    wide = tune_layer(
        layer, ["exact", {"name": "scann", "num_leaves": 32}], 32, Goal(budget_ms=1e6, batch=48), batches=(16,)
    )
    assert wide.chosen is not None
    assert wide.chosen.recall > 0.999
    small = {"name": "faiss_ivf", "nlist": 16}
    none = tune_layer(layer, [small], 32, Goal(budget_ms=1e-6, batch=16), batches=(16,))
    assert none.chosen is None
    assert none.heldout == {}
    with pytest.raises(ValueError, match="nothing was chosen"):
        none.spec  # noqa: B018
    assert none.nearest.args["nprobe"] == 1


def test_out_of_reach_is_no_choice() -> None:
    layer = real_layer("L10h0")
    poor = {"name": "faiss_ivf", "nlist": 48, "nprobe": 1}
    choice = tune_layer(layer, [poor], 32, Goal(recall=0.999, batch=16), batches=(16,))
    assert choice.chosen is None
    assert choice.nearest.recall < 0.9
    assert len(choice.trials) == 1
    few = LayerKeys("few", None, layer.keys[:, :20], layer.calibration, layer.heldout, None, None)
    with pytest.raises(SettingError, match="too few keys for any index"):
        tune_layer(few, ["faiss_ivf"], 4, Goal(recall=0.5))


def test_heads_of_a_layer_are_tuned_together() -> None:
    qk = real_qk()["L10h0"]
    layers = layers_of({"L7h0": qk, "L7h1": qk, "L9h0": qk, "other": qk}, {"scale": {"7": 0.25}})
    assert [(layer.name, layer.layer, len(layer.keys), layer.scale) for layer in layers] == [
        ("layer 7", 7, 2, 0.25),
        ("layer 9", 9, 1, None),
        ("other", None, 1, None),
    ]
    with pytest.raises(SettingError, match="differ in size"):
        layers_of({"L7h0": qk, "L7h1": {**qk, "keys": qk["keys"][:, :5]}}, {})
    with pytest.raises(SettingError, match="too few queries"):
        layers_of({"L7h0": {**qk, "queries": qk["queries"][:, :1]}}, {})


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Real keys under the names of the memory layers of the configuration ``smoke``."""
    path = tmp_path / "qk.npz"
    arrays = {}
    for name, qk in zip(("L1h0", "L3h0"), map(some, real_qk()), strict=True):
        arrays |= {f"{name}_{kind}": part[0].numpy() for kind, part in qk.items()}
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_the_command_writes_what_run_accepts(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot, rows = (tmp_path / name for name in ("tuned.yaml", "tuned.png", "tuned.json"))
    words = ["bench", str(recorded), "--target-recall", "0.9", "--batch", "16", "--retriever", "faiss_ivf"]
    assert main([*words, "--out", str(out), "--plot", str(plot), "--json", str(rows)]) == 0
    said = capsys.readouterr().out
    for part in (
        "layer 1: 2,048 keys",
        "Layer 3: ",
        "on 48 held-out queries",
        "mass recall",
        "--config hnsw --config",
    ):
        assert part in said
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.read_text().splitlines()[0].endswith(" run --config hnsw --config tuned.yaml")
    told = {choice["layer"]: choice for choice in json.loads(rows.read_text())}
    specs = yaml.safe_load(out.read_text())["model"]["memory"]["retriever"]["layers"]
    assert specs == {layer: choice["chosen"] for layer, choice in told.items()}
    assert all(choice["heldout"]["recall"] > 0.85 for choice in told.values())
    assert main(["run", "--config", "smoke", "--config", str(out), "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)["model"]["memory"]["retriever"]["layers"]
    assert {int(layer): spec for layer, spec in resolved.items()} == specs
    assert main(["bench", str(recorded), "--config", str(out), "--repeats", "1", "--json", "-"]) == 0
    assert {row["keys"] for row in json.loads(capsys.readouterr().out)} == {"L1h0", "L3h0"}


def test_the_command_says_when_nothing_is_found(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned.yaml"
    words = ["bench", str(recorded), "--budget-ms", "0.000001", "--batch", "16", "--retriever", "exact"]
    assert main([*words, "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Layer 1: nothing reaches 1e-06 ms a call of 16 queries a head. The nearest: exact" in said
    assert "tuned.yaml is not written: nothing was found for layer 1, layer 3." in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--target-recall", "1.5"], "must lie between 0 and 1"),
        (["--budget-ms", "0"], "must be above 0"),
        (["--budget-ms", "1", "--target-recall", "0.9"], "cannot be had with --target-recall"),
        (["--out", "x.yaml"], "needs something to tune for"),
        (["--target-recall", "0.9", "--out", "nowhere/x.yaml"], "cannot be written there"),
        (["--target-recall", "0.9", "--batch", "0"], "batch=0"),
    ],
)
def test_the_command_refuses(more: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *more]) == 2
    assert part in capsys.readouterr().err


BY_LAYER = {"layers": {"1": {"name": "faiss_ivf", "nlist": 8, "min_index_size": 64}, 3: "exact"}}


def test_each_memory_layer_has_its_own_retriever() -> None:
    config = MemoryConfig(memory_layers=[1, -1], window=16, top_k=4, retriever=BY_LAYER)
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        memory = lm.ingest(torch.arange(3, 163)[None], lm.new_memory(1))
        memory.flush()
        retrievers = {number: layer.retriever for number, layer in memory.layers.items()}
        assert [type(one).__name__ for one in retrievers.values()] == ["FaissIVFRetriever", "ExactRetriever"]
        assert retrievers[1].indexed.min() > 0
        for other in (memory.snapshot(), memory.select_rows(torch.tensor([0, 0]))):
            assert [type(layer.retriever) for layer in other.layers.values()] == [type(r) for r in retrievers.values()]
    assert retriever_label(BY_LAYER) == "faiss_ivf+exact"
    assert index_size(BY_LAYER) == 64


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        ({}, "names no layer"),
        ({"one": "exact"}, "is no layer"),
        ({-1: "exact"}, "is no layer"),
        ({1: "hnws"}, "hnws"),
        ({1: {"layers": {1: "exact"}}}, "is by layer again"),
    ],
)
def test_retrievers_by_layer_are_checked(layers: dict[Any, Any], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        check_retriever({"layers": layers})


def test_a_layer_without_retriever_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingError, match="lacks layer 2"):
        MemoryConfig(memory_layers=[1, 2], retriever=BY_LAYER).resolve_layers(4)
    with pytest.raises(SettingError, match="stands beside layers"):
        check_retriever({**BY_LAYER, "name": "hnsw"})
    with pytest.raises(SettingError, match="no layer is meant here"):
        create_retriever(BY_LAYER, 8)
    assert layer_spec("hnsw", None) == "hnsw"
    assert main(["run", "--config", "smoke", "--model.memory.retriever={layers: {1: exact}}"]) == 2
    assert "lacks layer 3" in capsys.readouterr().err
