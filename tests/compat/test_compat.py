"""What earlier code wrote, the present code opens, and it answers the same.

``fixtures`` holds files as users have them on their disks; ``answers.json`` what the code that wrote them said. Numbers
of other processors differ in their last digits, so approximate indexes may differ in a few rows.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_backbone
from tests.compat import answers
from tests.compat.make_fixtures import ANSWERS, CLEAR, FIXTURES, copy_fixtures

pytestmark = [
    # Lightning runs inside the test process here; what it says of loaders and workers is no matter.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("folder"),
]
THEN: dict[str, Any] = json.loads(ANSWERS.read_text(encoding="utf-8"))
# Of logits, whose spread is about 1.
TOLERANCE = 1e-3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, as the working directory."""
    copy = copy_fixtures(tmp_path / "old")
    monkeypatch.chdir(copy)
    return copy


# Settings that came later, with the values that say what was done before.
LATER = {"distance": None, "dense_pairs": 0, "shards": None}
# Settings of a memory that ``attending`` has replaced, with the values that left them out.
REPLACED = {"integration": "softmax", "max_distance": None, "segments": [], "dilations": []}


def _in_new_words(value: Any) -> Any:
    """What was written before 0.2.0, as it is written now."""
    if isinstance(value, list):
        # Tasks that came later, too.
        later = re.compile(rf"memory\.({'|'.join([*REPLACED, *LATER, 'attending'])})$|^(config\.evaluation\.)?lookup$")
        return [_in_new_words(item) for item in value if not (isinstance(item, str) and later.search(item))]
    if not isinstance(value, dict):
        return value
    found = {key: _in_new_words(item) for key, item in value.items()}
    if "key_value" in found and found.get("lookup") is None:
        found.pop("lookup", None)
    if "memory_layers" in found:
        found = {key: item for key, item in found.items() if key not in LATER or item != LATER[key]}
        given = {key: found.pop(key) for key in REPLACED if key in found}
        if given.get("integration") == "gate":
            found["attending"] = {"name": "gate"}
        if found.get("attending") is None:
            found.pop("attending", None)
    return found


def _near(found: Any, then: Any, tolerance: float = TOLERANCE) -> None:
    assert torch.tensor(found).shape == torch.tensor(then).shape
    torch.testing.assert_close(torch.tensor(found), torch.tensor(then), atol=tolerance, rtol=tolerance)


def _share(found: Any, then: Any) -> float:
    """Share of the rows found then that are found now."""
    now, before = torch.tensor(found), torch.tensor(then)
    assert now.shape == before.shape
    return float((before.unsqueeze(-1) == now.unsqueeze(-2)).any(-1).float().mean())


def _without(value: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in names}


@pytest.mark.parametrize("retriever", answers.RETRIEVERS)
@pytest.mark.parametrize("dtype", answers.DTYPES)
def test_memories(dtype: str, retriever: str) -> None:
    then, now = THEN["memories"][dtype][retriever], answers.memory_answer(dtype, retriever)
    for name in ("lengths", "tokens_seen", "documents", "read"):
        assert now[name] == then[name], name
    for layer in map(str, answers.LAYERS):
        # Stored numbers are read, not computed.
        _near(now["keys"][layer], then["keys"][layer], 1e-5)
        _near(now["values"][layer], then["values"][layer], 1e-5)
        assert now["indexed"][layer] is (retriever != "exact")
        least = {"exact": 0.99, "hnsw": 0.95, "faiss_ivf": 0.8}[retriever]
        assert _share(now["found"][layer], then["found"][layer]) >= least
    if retriever == "faiss_ivf" and now["found"] != then["found"]:
        return  # its cells were cut otherwise, so that the model sees other pairs
    _near(now["logits"], then["logits"])
    for row, (written, before) in enumerate(zip(now["generated"], then["generated"], strict=True)):
        unclear = [step[row] <= CLEAR for step in then["margins"]]
        clear = unclear.index(True) if True in unclear else len(unclear)
        assert written[:clear] == before[:clear]


def test_exact_search_finds_the_best_keys_of_an_old_memory() -> None:
    config = answers.memory_config("float32", "exact")
    with attach_memory(load_backbone(answers.BACKBONE), config) as lm:
        memory = lm.load_memory("memories/float32")
        for layer in answers.LAYERS:
            asked, keys = answers.queries(memory, layer), answers.folded(memory.layers[layer].keys)
            scores = asked.double() @ keys.double().transpose(1, 2)
            then = torch.tensor(THEN["memories"]["float32"]["exact"]["found"][str(layer)])
            best = scores.topk(answers.TOP_K).values
            torch.testing.assert_close(scores.gather(2, then).sort(descending=True).values, best, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", answers.DTYPES)
def test_an_old_memory_grows(dtype: str) -> None:
    config = answers.memory_config(dtype, "exact")
    with attach_memory(load_backbone(answers.BACKBONE), config) as lm:
        memory = lm.load_memory(f"memories/{dtype}")
        rows, seen = memory.batch_size, memory.tokens_seen.tolist()
        before = {file.name for file in Path(f"memories/{dtype}").glob("memory-*")}
        lm.ingest(answers.ids(rows, 40, seed=9), memory, document="second.txt")
        memory.save(f"memories/{dtype}")
        again = lm.load_memory(f"memories/{dtype}")
        assert again.tokens_seen.tolist() == [count + 40 for count in seen]
        assert again.lengths.tolist() == memory.lengths.tolist()
        if config.capacity is None:
            # What was saved then is kept; one file is added.
            assert before < {file.name for file in Path(f"memories/{dtype}").glob("memory-*")}


def test_a_memory_of_another_model_is_refused() -> None:
    model = load_backbone(answers.BACKBONE)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight.mul_(1.01)
    config = answers.memory_config("float32", "exact")
    with attach_memory(model, config) as lm, pytest.raises(SettingError, match="weights differ"):
        lm.load_memory("memories/float32")


@pytest.mark.parametrize("name", ["hnsw", "faiss_ivf"])
def test_saved_retrievers(name: str) -> None:
    then, now = THEN["retrievers"][name], answers.retriever_answer(name)
    assert now["lengths"] == then["lengths"]
    assert _share(now["found"], then["found"]) >= {"hnsw": 0.95, "faiss_ivf": 0.8}[name]
    removed = torch.arange(0, 200, 9)
    assert not torch.isin(torch.tensor(now["found"][0]), removed).any()


def test_ask_a_library() -> None:
    then, now = THEN["ask"], answers.ask_answer()
    assert _in_new_words(_without(now, "passages")) == _in_new_words(_without(then, "passages"))
    for passage, before in zip(now["passages"], then["passages"], strict=True):
        assert _without(passage, "share", "rank_share") == _without(before, "share", "rank_share")
        _near([passage["share"], passage["rank_share"]], [before["share"], before["rank_share"]])


def test_a_library_knows_what_it_has_read() -> None:
    said = answers.command("ingest", "library", "text/book0.txt", "text/book1.txt", "text/code", "text/notes.jsonl")
    assert "Nothing to read" in said
    assert "5 documents" in said
    Path("new.txt").write_text("Something that it has not read yet.", encoding="utf-8")
    said = answers.command("ingest", "library", "new.txt")
    assert "Read 1 document" in said
    assert "6 documents" in said


@pytest.mark.parametrize("name", ["exported", "delta"])
def test_exported_models_and_deltas(name: str) -> None:
    then, now = THEN["folders"][name], answers.folder_answer(name)
    assert _in_new_words(now["settings"]) == _in_new_words(then["settings"])
    _near(now["logits"], then["logits"])


def test_an_exported_model_opens_without_this_package() -> None:
    from transformers import AutoModelForCausalLM

    text = answers.ids(1, 20, seed=8)
    plain: Any = AutoModelForCausalLM.from_pretrained("exported")
    with torch.no_grad():
        torch.testing.assert_close(plain(text).logits, load_backbone("exported")(text).logits)


@pytest.mark.parametrize(("words", "name", "weights"), [
    ([], "exported", "model.safetensors"),
    (["--delta"], "delta", "delta.safetensors"),
])  # fmt: skip
def test_a_run_is_exported_as_before(folder: Path, words: list[str], name: str, weights: str) -> None:
    answers.command("export", "run", "again", *words)
    # A card came later, and what tells plain transformers that a delta is no model.
    later = {"README.md", "config.json"} if words else {"README.md"}
    assert {file.name for file in Path("again").iterdir()} == {file.name for file in Path(name).iterdir()} | later
    now, then = load_file(folder / "again" / weights), load_file(folder / name / weights)
    assert now.keys() == then.keys()
    for key, tensor in then.items():
        torch.testing.assert_close(now[key], tensor, msg=key)
    for file in ("lightning_fot.json", "lightning_fot_delta.json"):
        if Path(name, file).is_file():
            written = json.loads(Path("again", file).read_text())
            # Digests and the card are new; all else is as it was.
            kept = {key: value for key, value in written.items() if key not in ("sha256", "digests", "card")}
            if "files" in kept:
                kept["files"] = [one for one in kept["files"] if one not in later - set(os.listdir(name))]
            assert _in_new_words(kept) == _in_new_words(json.loads(Path(name, file).read_text()))


def test_recorded_keys() -> None:
    then, now = THEN["keys"], answers.keys_answer()
    for name in ("metadata", "shapes", "columns"):
        assert now[name] == then[name], name
    assert now["sums"] == pytest.approx(then["sums"])
    for row, before in zip(now["rows"], then["rows"], strict=True):
        assert _without(row, "recall") == _without(before, "recall")
        assert row["recall"] == pytest.approx(before["recall"], abs=0.05)


def test_keys_are_recorded_as_before(folder: Path) -> None:
    record = ["--tokens=512", "--past=128", "--queries=64", "--data.paths=[text]"]
    answers.command("bench", "--record=again.safetensors", "--config=run.yaml", *record)
    now, then = load_file(folder / "again.safetensors"), load_file(folder / "keys.safetensors")
    assert now.keys() == then.keys()
    for name, tensor in then.items():
        # float16: one step of the last digit.
        torch.testing.assert_close(now[name], tensor, atol=1e-3, rtol=2e-3, msg=name)


@pytest.mark.slow
def test_a_finished_sweep() -> None:
    cells = {path.name: path.read_bytes() for path in Path("sweep/cells").glob("*.json")}
    now = answers.sweep_answer()
    assert cells
    then = dict(THEN["sweep"])
    # Settings that came later may be there too.
    assert set(now.pop("structure")) == {*then.pop("structure"), "config.sweep.workers"}
    assert now == then
    assert {path.name: path.read_bytes() for path in Path("sweep/cells").glob("*")} == cells


@pytest.mark.slow
def test_the_report_of_a_run() -> None:
    assert answers.report_answer() == THEN["report"]


def test_reports_are_a_module_to_be_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["report", "run"])
    # Another test of this process may have imported it, of which runpy warns.
    monkeypatch.delitem(sys.modules, "lightning_fot.report.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lightning_fot.report", run_name="__main__")
    assert ended.value.code == 0
    assert "run/report.html" in capsys.readouterr().out
    assert answers.page_text(Path("run/report.html")) == THEN["report"]["page"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "gate", "lora"])
def test_training_goes_on(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    then, now = THEN["resume"][name], answers.resume_answer(name)
    assert now["steps"] == then["steps"] == [0, 1, 2, 3, 4]
    assert now["losses"] == pytest.approx(then["losses"], rel=TOLERANCE)
    assert now["training"] == pytest.approx(then["training"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "gate", "lora"])
def test_a_checkpoint_is_validated(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert answers.validate_answer(name) == pytest.approx(THEN["validate"][name], rel=TOLERANCE, abs=TOLERANCE)


def test_a_finished_run_keeps_its_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = json.loads(Path("run/evaluation/partial.json").read_text())
    assert _in_new_words(answers.finish_answer()) == _in_new_words(THEN["finish"])
    # Nothing was measured again: not a digit of a time has changed.
    # Its digest is new.
    assert _without(json.loads(Path("run/evaluation/partial.json").read_text()), "sha256") == before


@pytest.mark.slow
def test_a_new_run_has_the_results_of_an_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers.command("run", "--config=run.yaml", "--run_dir=again")
    now, then = (json.loads(Path(run, "results.json").read_text()) for run in ("again", "run"))
    new, old = (_in_new_words(answers.structure(results)) for results in (now, then))
    assert [name for name in new if name != "sha256"] == old
    for row, before in zip(now["perplexity"], then["perplexity"], strict=True):
        assert row["nll"] == pytest.approx(before["nll"], rel=TOLERANCE)
    assert _in_new_words(_without(now["config"], "run_dir")) == _in_new_words(_without(then["config"], "run_dir"))
    names = {str(path.relative_to("run")) for path in Path("run").rglob("*") if path.is_file()}
    assert names <= {str(path.relative_to("again")) for path in Path("again").rglob("*") if path.is_file()}
    assert Path("again/metrics.csv").read_text().splitlines()[0] == Path("run/metrics.csv").read_text().splitlines()[0]


_MACHINE = re.compile(rb"(?<![\w.@/])/(?:home|root|Users|work|tmp|var|mnt|opt|srv|data)/")


def _files(keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    return [path for path in FIXTURES.rglob("*") if path.is_file() and keep(path)]


def test_the_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in [*_files(), ANSWERS]) < 3_000_000


@pytest.mark.parametrize("kind", [".json", ".yaml", ".csv", ".jsonl", ".safetensors"])
def test_no_path_of_a_machine_is_in_them(kind: str) -> None:
    found = _files(lambda path: path.suffix == kind)
    assert found
    for path in found:
        assert _MACHINE.search(path.read_bytes()) is None, path


def test_no_path_of_a_machine_is_in_checkpoints_or_answers() -> None:
    assert _MACHINE.search(ANSWERS.read_bytes()) is None
    for path in _files(lambda path: path.suffix == ".ckpt"):
        text = repr(torch.load(path, weights_only=True)).encode()
        assert _MACHINE.search(text) is None, path
