"""Settings that ``attending`` has replaced: they work wherever they were written, and say what replaces them."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.commands.job.parsing import parse
from lightning_fot.errors import SettingError
from lightning_fot.library.library import Library
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.pretrained.longllama import SETTINGS_FILE
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import SHIPPED, read_request
from lightning_fot.training.batch_logits import batch_logits
from tests.support.models import WINDOW, settings, tiny_llama, tokens

DILATED = {"name": "dilated", "segments": [8, 16], "dilations": [1, 2]}
RECTIFIED = {"name": "rectified", "max_distance": 7}
OLD = [
    ({"integration": "gate"}, {"name": "gate"}),
    ({"segments": [8, 16], "dilations": [1, 2]}, DILATED),
    ({"memory_layers": [], "max_distance": 7}, RECTIFIED),
]
# What every configuration and folder written before holds beside them.
NEUTRAL = {"integration": "softmax", "max_distance": None, "segments": [], "dilations": []}


@pytest.mark.parametrize(("old", "attending"), OLD)
def test_old_arguments_work_and_say_what_replaces_them(old, attending) -> None:
    with pytest.warns(DeprecationWarning, match=rf"now written model.memory.attending=.*{attending['name']}") as caught:
        config = MemoryConfig(**old)
    assert caught[0].filename == __file__
    assert config.attending == attending
    assert config == MemoryConfig(memory_layers=config.memory_layers, attending=attending)
    # What is written from now on has the new words alone.
    assert not set(NEUTRAL) & set(asdict(config))
    assert replace(config, top_k=3).attending == attending


def test_old_values_that_say_nothing_are_silent_and_leave_a_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MemoryConfig(**NEUTRAL).attending is None
        assert MemoryConfig(attending="gate", integration="softmax").attending is None
        assert MemoryConfig(attending=DILATED, segments=[], dilations=[]).attending is None
        assert MemoryConfig(attending="gate", segments=[], dilations=[]).attending == {"name": "gate"}


def test_an_old_argument_beside_the_new_one_wins_where_it_is_the_same_way() -> None:
    with pytest.warns(DeprecationWarning, match="max_distance=9"):
        config = MemoryConfig(memory_layers=[], attending=RECTIFIED, max_distance=9)
    assert config.attending == {"name": "rectified", "max_distance": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"integration": "mix"}, r"model\.memory\.integration='mix': is not known"),
        ({"integration": "gate", "attending": DILATED}, "integration='gate': is another way"),
        ({"memory_layers": [], "max_distance": 7, "integration": "gate"}, "integration='gate': is another way"),
        ({"memory_layers": [], "max_distance": 0}, r"max_distance=0: must be a whole number"),
        ({"max_distance": 7}, r"max_distance=7: is for windows that are read alone"),
        ({"dilations": [1]}, r"segments=\[\]: has not one each"),
        ({"segments": 8, "dilations": [1]}, r"segments=8: must hold whole numbers"),
    ],
)
def test_old_arguments_that_cannot_work_are_named(changes, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MemoryConfig(**changes)


def _file(tmp_path, memory: str, crossbatch: str = "{}"):
    path = tmp_path / "old.yaml"
    path.write_text(
        f"model: {{backbone: tiny-random-llama, memory: {memory}, crossbatch: {crossbatch}}}\n"
        "evaluation: {readings: [full_context]}\n"
    )
    return path


def _job(path, *overrides: str):
    words = ["--config", str(path), *overrides]
    request = read_request("run", words)
    check_settings(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return request, parse(request, words)


def test_yaml_with_old_keys_runs_with_a_note_and_its_resolved_configuration_runs_again(tmp_path) -> None:
    path = _file(tmp_path, "{memory_layers: [], window: 16, max_distance: 7, integration: softmax, segments: []}")
    request, job = _job(path)
    assert job.model.memory_config.attending == RECTIFIED
    written = 'model.memory.attending={"name": "rectified", "max_distance": 7}'
    assert f"model.memory.max_distance=7: now written {written}." in request.notes
    again = tmp_path / "config.yaml"
    again.write_text(job.config_text())
    assert not set(NEUTRAL) & set(yaml.safe_load(again.read_text())["model"]["memory"])
    assert _job(again)[1].model.memory_config == job.model.memory_config
    assert _job(path, "--model.memory.max_distance=9")[1].model.memory_config.attending["max_distance"] == 9
    with pytest.raises(SettingError, match=r"max_distance=0"):
        _job(path, "--model.memory.max_distance=0")


@pytest.mark.slow
def test_a_shipped_configuration_takes_old_words_of_the_command_line() -> None:
    path = SHIPPED / "baselines" / "memorizing.yaml"
    assert _job(path)[1].model.memory_config.attending == {"name": "gate"}
    assert _job(path, "--model.memory.integration=softmax")[1].model.memory_config.attending is None


def test_a_later_file_replaces_the_way_of_an_earlier_one(tmp_path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("model: {memory: {attending: {name: gate}}}\n")
    words = ["--config", str(SHIPPED / "baselines" / "dilated.yaml"), "--config", str(later)]
    request = read_request("run", words)
    assert request.get("model.memory.attending") == {"name": "gate"}


def test_the_old_layout_trains_the_same_and_says_what_replaces_it(tmp_path) -> None:
    ids = tokens(4, 8)
    memory = settings(memory_layers=[], overlap=8)
    old = CrossbatchConfig(layout="previous_window", pack=2, differentiable=False)
    with pytest.warns(DeprecationWarning, match=r"attending.name=previous_window, with layout=packed") as caught:
        before = FocusedTransformer("tiny-random-llama", memory, old, trainable="all")
    assert caught[0].filename == __file__
    attending = replace(memory, attending="previous_window")
    now = FocusedTransformer("tiny-random-llama", attending, replace(old, layout="packed"), trainable="all")
    logits = []
    for module in (before, now):
        module.configure_model()
        logits.append(batch_logits(module.lm, {"input_ids": ids}, module.crossbatch_config))
    assert torch.equal(*logits)
    path = _file(tmp_path, "{memory_layers: [], window: 16, overlap: 8}", "{layout: previous_window, pack: 2}")
    request, job = _job(path)
    assert job.model.memory_config.attending == {"name": "previous_window"}
    assert any("layout=previous_window: now written model.memory.attending" in note for note in request.notes)
    with pytest.raises(SettingError, match="layout='previous_window': is another way"):
        FocusedTransformer("tiny-random-llama", MemoryConfig(attending="gate"), old)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "attending"), OLD)
def test_a_folder_saved_with_old_keys_opens(tmp_path, old, attending) -> None:
    ids = tokens(2, 2 * WINDOW)
    new = {key: value for key, value in old.items() if key == "memory_layers"}
    with attach_memory(tiny_llama(), settings(**new, attending=attending)) as lm, torch.no_grad():
        for gate in lm.gates.values():
            gate.add_(torch.linspace(-1, 1, len(gate)))
        expected = lm(ids).logits
        lm.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / SETTINGS_FILE
    content = json.loads(file.read_text())
    # Versions with the old keys wrote no digests.
    content = {key: value for key, value in content.items() if key not in ("sha256", "digests", "card")}
    assert content["memory"].pop("attending") == attending
    file.write_text(json.dumps({**content, "memory": {**content["memory"], **NEUTRAL, **old}}))
    with attach_pretrained(str(tmp_path / "model")) as lm, torch.no_grad():
        assert lm.config.attending == attending
        assert torch.equal(lm(ids).logits, expected)
    with attach_pretrained(str(tmp_path / "model"), memory_layers=[1], attending=None) as lm:
        assert lm.config.attending is None


def test_a_run_on_such_a_folder_takes_its_way_and_lets_old_words_replace_it(tmp_path) -> None:
    folder = tmp_path / "model"
    with attach_memory(load_backbone("tiny-random-llama"), settings(attending="gate")) as lm:
        lm.save_pretrained(folder, load_tokenizer("tiny-random-llama"))
    for words, expected in (
        ([], {"name": "gate"}),
        (["--model.memory.integration=softmax"], None),
        (["--model.memory.integration=gate"], {"name": "gate"}),
    ):
        request = read_request("run", [f"--model.backbone={folder}", *words])
        check_settings(request)
        assert MemoryConfig(**request.get("model.memory")).attending == expected
        assert any("was made for attending" in note for note in request.notes) == (expected is None)


def test_a_library_with_old_keys_is_read(tmp_path) -> None:
    memory = {**asdict(MemoryConfig()), **NEUTRAL}
    memory.pop("attending")
    model = {"backbone": "tiny-random-llama", "memory": memory, "dtype": "float32", "checkpoint": None}
    (tmp_path / "library.json").write_text(json.dumps({"format": 1, "model": model, "documents": []}))
    library = Library.read(tmp_path)
    assert library.model.memory == asdict(MemoryConfig())
    assert not any(name in library.model.flat() for name in (f"model.memory.{key}" for key in NEUTRAL))
