"""Every shipped YAML parses, and overrides work on each of them. Loads torch and Lightning, but no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_fot.commands.job.parsing import JobCLI, explain, parse
from lightning_fot.errors import SettingError
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import SHIPPED, Request, find_config, read_request
from lightning_fot.retrievers import check_retriever

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
IN_FOLDERS = sorted(
    f"{path.parent.name}/{path.stem}" for kind in ("baselines", "paper") for path in (SHIPPED / kind).glob("*.yaml")
)


def _parse(name: str, *overrides: str) -> tuple[Request, JobCLI]:
    request = read_request("run", ["--config", name, *overrides])
    arguments = [word for path in request.configs for word in ("--config", str(path))]
    return request, parse(request, [*arguments, *request.overrides])


def test_the_configurations_of_the_contract_are_there() -> None:
    assert {"hnsw", "exact", "faiss_ivf", "scann", "smoke"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parses_and_says_how_to_run_it(name: str) -> None:
    first = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# lightning run --config configs/{name}.yaml"
    request, cli = _parse(name)
    memory = cli.model.memory_config
    check_retriever(memory.retriever)
    if name not in ("smoke", "mixture", "tasks", "smollm2_fot", "training_free"):
        retriever = memory.retriever
        assert (retriever if isinstance(retriever, str) else retriever["name"]) == name
    # What the light pass reads is what jsonargparse makes of it.
    assert request.get("model.memory.retriever") == memory.retriever
    assert request.get("evaluation.context_tokens") == cli.evaluation.context_tokens
    # The links.
    data = cli.datamodule
    assert data.tokenizer == cli.model.backbone_name
    assert data.window == memory.window
    assert data.layout == cli.model.crossbatch_config.layout
    assert data.pack == cli.model.crossbatch_config.pack
    assert data.prev_windows == cli.model.crossbatch_config.w


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FOLDERS)
def test_those_in_folders_parse_and_say_how_to_run_them(name: str) -> None:
    path, _ = find_config(f"configs/{name}.yaml")
    first = path.read_text(encoding="utf-8").splitlines()[0]
    # A file that is laid over others names one to lay it over.
    below = ["--config", "configs/exact.yaml"] if name == "paper/perplexity" else []
    words = [*below, "--config", f"configs/{name}.yaml"]
    assert first == f"# lightning run {' '.join(words)}"
    request, cli = _parse(*words[1:])
    check_settings(request)
    if below:
        assert cli.trainer.max_steps == 40


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("retriever", ["exact", "scann", "hnsw", "faiss_ivf"])
def test_another_retriever_replaces_the_old_one_with_its_arguments(name: str, retriever: str) -> None:
    request, cli = _parse(name, f"--model.memory.retriever={retriever}", "--trainer.max_steps=0", "--run_dir=out")
    before = read_request("run", ["--config", name]).get("model.memory.retriever")
    kept = isinstance(before, dict) and retriever != "exact"
    expected = {"name": retriever, "min_index_size": before["min_index_size"]} if kept else retriever
    assert cli.model.memory_config.retriever == expected
    assert request.get("model.memory.retriever") == expected
    assert cli.trainer.max_steps == 0
    assert cli.config.run_dir == "out"


def test_overrides_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    request, cli = _parse(
        "hnsw",
        "--model.memory.top_k=64",
        "--model.memory.retriever.M=24",
        "--model.backbone=tiny-random-llama",
        "--model.memory.memory_layers=[1,-1]",
        f"--data.paths=[{tmp_path}]",
        "--seed_everything",
        "11",
    )
    check_settings(request)
    memory = cli.model.memory_config
    assert memory.top_k == 64
    assert memory.retriever["M"] == 24
    assert memory.retriever["name"] == "hnsw"
    assert memory.memory_layers == [1, -1]
    assert cli.datamodule.paths == [str(tmp_path)]
    assert cli.datamodule.tokenizer == "tiny-random-llama"
    assert cli.config.seed_everything == 11
    assert request.get("seed_everything") == 11


def test_one_setting_of_a_task_is_overridden_and_a_task_is_left_out() -> None:
    request, cli = _parse("tasks", "--evaluation.needles.tokens=[4096, 16384]", "--evaluation.story=null")
    check_settings(request)
    needles = cli.evaluation.needles
    assert (needles.tokens, needles.keys, needles.samples) == ([4096, 16384], 4, 2)
    assert cli.evaluation.story is None
    assert cli.config_dict(run_dir=None)["evaluation"]["needles"]["tokens"] == [4096, 16384]
    with pytest.raises(
        SettingError,
        match=r"key=3: is not a known setting. Did you mean evaluation\.needles\.keys",
    ):
        check_settings(read_request("run", ["--config", "tasks", "--evaluation.needles.key=3"]))


def test_several_files_and_references(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(
        "model: {memory: {window: 32, retriever: {name: faiss_ivf, nprobe: 4}}}\n"
        "evaluation: {target_tokens: '${model.memory.window}'}\n",
        encoding="utf-8",
    )
    request, cli = _parse("smoke", "--config", str(tmp_path / "top.yaml"), "--model.memory.window=48")
    check_settings(request)
    assert cli.model.memory_config.window == 48
    assert cli.evaluation.target_tokens == 48
    assert request.get("evaluation.target_tokens") == 48
    assert cli.model.memory_config.retriever == {"name": "faiss_ivf", "nprobe": 4}
    assert request.get("model.memory.retriever") == {"name": "faiss_ivf", "nprobe": 4}


def test_the_resolved_configuration_can_be_run_again(tmp_path: Path) -> None:
    _, cli = _parse("smoke", "--model.memory.top_k=7")
    again = tmp_path / "config.yaml"
    again.write_text(cli.config_text(run_dir="out"), encoding="utf-8")
    request, second = _parse(str(again))
    check_settings(request)
    assert second.model.memory_config == cli.model.memory_config
    assert second.evaluation == cli.evaluation
    assert second.config_dict(run_dir=None) == cli.config_dict(run_dir=None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--trainer.max_step=3"], "trainer.max_step"),  # no abbreviations
        (["--trainer.max_steps=x"], "trainer.max_steps='x': must be int"),
        (["--trainer.accelerator=zpu"], "trainer.accelerator='zpu'"),
        (["--model.optimizer.init_args.lrr=3"], "lrr"),
        (["--model.trainable=some"], "model.trainable='some'"),
        (["--data.batch_size=3"], "data.batch_size=3: is not a multiple of pack=2"),
        (["--model.memory.positions=second"], "model.memory.positions"),
    ],
)
def test_errors_name_setting_value_and_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        _parse("smoke", *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1]", "model=[1]: must hold settings"),
        ("model: {memory: 3}", "model.memory=3: must hold settings"),
        ("modle: {}", "modle={}: is not a known setting. Did you mean model?"),
        ("data: {window: 3}", "data.window=3: always follows model.memory.window"),
        ("model: {memory: {window: '${model.nothing}'}}", "model.memory.window='${...}': cannot be resolved"),
        ("evaluation: {documents: 0}", "evaluation.documents=0: must be a whole number"),
        ("evaluation: {context_tokens: 3}", "evaluation.context_tokens=3: must be of type list[int]. Correct it."),
        ("data: {paths: []}", "data.paths=[]: is empty"),
        ("a: b: c", "is not valid YAML"),
        ("- 1", "holds no settings"),
    ],
)
def test_errors_in_a_file_come_before_jsonargparse(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError) as caught:
        check_settings(read_request("run", ["--config", str(file)]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Group 'trainer' does not accept option 'max_step'", "trainer.max_step"),
        ("unrecognized arguments: --foo=3 --bar", "foo='3'"),
        ("something new", "something new"),
    ],
)
def test_messages_of_jsonargparse(message: str, expected: str) -> None:
    assert expected in str(explain(message, Request("run", [], [])))


@pytest.mark.parametrize("word", ["hnsw", "hnsw.yaml", "configs/hnsw.yaml", "./configs/hnsw.yaml"])
def test_shipped_names(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, note = find_config(word)
    assert path == SHIPPED / "hnsw.yaml"
    assert note is not None
    assert "hnsw" in note
    # A file of that name wins, in silence.
    own: Any = tmp_path / word
    own.parent.mkdir(exist_ok=True)
    own.write_text("{}", encoding="utf-8")
    assert find_config(word) == (Path(word), None)
