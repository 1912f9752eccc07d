"""The dataclasses of settings against what they are the settings of."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from lightning.pytorch import Trainer

from lightning_fot.commands.job.parsing import JobCLI, parse
from lightning_fot.config.data import DataConfig
from lightning_fot.config.model import ModelConfig
from lightning_fot.config.run import LIGHTNING, TRAINER, RunConfig
from lightning_fot.data import CrossbatchDataModule
from lightning_fot.errors import SettingError
from lightning_fot.request import preflight
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import find_config, read_request
from lightning_fot.training.module import FocusedTransformer

# Classes of other libraries, which only jsonargparse can make.
MADE_LATER = {"optimizer", "lr_scheduler"}


@pytest.mark.parametrize(("section", "owner"), [(ModelConfig, FocusedTransformer), (DataConfig, CrossbatchDataModule)])
def test_a_section_has_the_arguments_of_its_class(section: type, owner: type) -> None:
    fields = {item.name: item for item in dataclasses.fields(section)}
    parameters = dict(inspect.signature(owner.__init__).parameters)
    parameters.pop("self")
    assert list(fields) == list(parameters)
    types, wanted = get_type_hints(section), get_type_hints(owner.__init__)
    made = section()
    for name, parameter in parameters.items():
        if name in MADE_LATER:
            assert types[name] is Any
            continue
        assert types[name] == wanted[name], name
        assert getattr(made, name) == parameter.default, name


def test_the_trainers_arguments_are_lightnings() -> None:
    parameters = list(inspect.signature(Trainer.__init__).parameters)[1:]
    # A newer Lightning may have more; what is named here it has to have.
    assert set(TRAINER) <= set(parameters)
    from importlib.metadata import version

    if tuple(map(int, version("lightning").split(".")[:2])) == LIGHTNING:
        assert set(TRAINER) == set(parameters)


def _job() -> JobCLI:
    path, _ = find_config("smoke")
    return parse(read_request("run", ["--config", str(path)]), ["--config", str(path)])


def test_a_whole_configuration_has_the_sections_of_a_job() -> None:
    job = _job()
    fields = {item.name for item in dataclasses.fields(RunConfig)}
    assert fields == set(job.config_dict())
    defaults = job.parser.get_defaults()
    for name in ("run_dir", "ckpt_path", "seed_everything"):
        assert getattr(RunConfig(), name) == defaults[name]
    assert RunConfig().evaluation.context_tokens == defaults["evaluation"]["context_tokens"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.trainable=some", "model.trainable='some': is not known. Choose one of memory_layers,"),
        ("model.dtype=float23", "model.dtype='float23': is not known. Did you mean float32?"),
        ("model.gradient_checkpointing=3", "model.gradient_checkpointing=3: must be of type bool"),
        ("model.memory.window=x", "model.memory.window='x': must be of type int"),
        ("model.memory.window=null", "model.memory.window=None: must be of type int"),
        ("model.memory.capacity=x", "model.memory.capacity='x': must be of type int | None"),
        ("model.memory.memory_layers=[a]", "model.memory.memory_layers=['a']: must be of type list[int] |"),
        ("model.memory.memory_layers=every", "memory_layers='every': must be of type list[int] | Literal['all']"),
        ("model.memory.positions=second", "model.memory.positions='second': is not known. Choose one of first, none,"),
        ("model.memory.dtype=int9", "model.memory.dtype='int9': is not known. Did you mean int8?"),
        ("model.lora.rnk=3", "model.lora.rnk=3: is not a known setting. Did you mean model.lora.rank?"),
        ("model.lora={rank: 0}", "model.lora.rank=0: must be a whole number of at least 1"),
        ("model.rope={factor: [2]}", "model.rope.factor=[2]: must be of type float"),
        ("model.crossbatch.schedule={kind: drow}", "schedule.kind='drow': is not known. Did you mean draw?"),
        ("model.crossbatch.schedule.value=[1]", "Did you mean model.crossbatch.schedule.values?"),
        ("model.crossbatch.pack=3", "data.batch_size=4: is not a multiple of pack=3"),
        ("data.batch_size=3", "data.batch_size=3: is not a multiple of pack=2"),
        ("data.heldout_fraction=2", "data.heldout_fraction=2: must be between 0 and 1"),
        ("data.sources=3", "data.sources=3: must be a list of sources"),
        ("data.max_tokens=1", "data.max_tokens=1: must be a whole number of at least 2"),
        ("evaluation.readings=[memry]", "evaluation.readings=['memry']: names no reading"),
        ("evaluation.needles={keys: x}", "evaluation.needles.keys='x': must be of type int"),
        ("evaluation.needles=3", "evaluation.needles=3: must hold settings"),
        ("evaluation.needles={keys: 101}", "evaluation.needles.keys=101: are told apart by 100 names"),
        ("ckpt_path=[a]", "ckpt_path=['a']: must be of type str | None"),
        ("trainer.max_step=3", "trainer.max_step=3: is not a known setting. Did you mean trainer.max_steps?"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_jsonargparse_reads_them_all(word: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        check_settings(read_request("run", ["--config", "smoke", f"--{word}"]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--model.memory.score_factor=1e-1"],  # YAML 1.1 reads a text
        ["--run_dir=2024"],
        ["--model.memory.retriever={layers: {1: exact, 3: {name: hnsw, M: 8}}}"],
        ["--model.rope={class_path: lightning_fot.config.RopeSettings, init_args: {type: ntk, factor: 2}}"],
        ["--model.crossbatch.schedule={kind: step, values: [1, 2], at: [3]}"],
        ["--model.optimizer=torch.optim.SGD"],
        ["--model.lora=null", "--evaluation.story=null"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x"],
        ["--trainer.a_thing_of_tomorrow=3"],
    ],
)
def test_right_settings_pass(words: list[str]) -> None:
    layers = "--model.memory.memory_layers=[1, 3]"
    check_settings(read_request("run", ["--config", "smoke", layers, *words]))


def test_a_number_may_be_written_as_a_calculator_does() -> None:
    request = read_request("lm-eval", ["--config", "smoke", "--model.memory.score_factor=1e-1"])
    from lightning_fot.request.model import settings_of

    assert settings_of(request).config.score_factor == 0.1


def test_a_schedule_of_steps_comes_through_both_readings() -> None:
    schedule = "--model.crossbatch.schedule={kind: step, values: [1, 2], at: [3]}"
    request = read_request("run", ["--config", "smoke", schedule])
    found = parse(request, ["--config", str(request.configs[0]), *request.overrides]).model.crossbatch_config.schedule
    assert [found.count(step) for step in (2, 3)] == [1, 2]
    with pytest.raises(SettingError, match=r"schedule\.at=\[2\.5\]: must be whole numbers"):
        check_settings(read_request("run", ["--config", "smoke", schedule.replace("[3]", "[2.5]")]))


def test_a_newer_lightning_may_have_arguments_like_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    request = read_request("run", ["--config", "smoke", "--trainer.max_step=3"])
    monkeypatch.setattr(preflight, "version", lambda name: "2.7.0")
    check_settings(request)


def test_verbs_that_read_the_model_alone_leave_the_data_to_others(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {backbone: tiny-random-llama, crossbatch: {pack: 8}}\n", encoding="utf-8")
    check_settings(read_request("ingest", ["--config", str(file)]))
    with pytest.raises(SettingError, match=r"data\.batch_size=4: is not a multiple of pack=8"):
        check_settings(read_request("run", ["--config", str(file)]))
