"""What a configuration may have made."""

from __future__ import annotations

import faulthandler
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_fot.commands.job.classes import check_classes
from lightning_fot.commands.job.parsing import parse, quiet
from lightning_fot.errors import SettingError
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import read_request

_EVIL = """
def run(*given, **named):
    open("ran", "w").close()

class Evil:
    def __init__(self, *given, **named):
        run()
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(_EVIL, encoding="utf-8")
    return tmp_path / "ran"


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("--model.optimizer={class_path: evil.run}", "model.optimizer='evil.run': is no subclass of Optimizer"),
        ("--model.optimizer={class_path: os.system}", "os.system"),
        ("--model.lr_scheduler={class_path: evil.run}", "model.lr_scheduler='evil.run'"),
        ("--trainer.callbacks=[{class_path: evil.Evil}]", "trainer.callbacks"),
        ("--trainer.logger={class_path: evil.Evil}", "trainer.logger"),
        (
            "--trainer.callbacks={class_path: lightning.pytorch.callbacks.LambdaCallback, "
            "init_args: {on_fit_start: evil.run}}",
            "trainer.callbacks.init_args.on_fit_start='run'",
        ),
        ("--model.memory.retriever={name: {class_path: evil.Evil}}", "model.memory.retriever.name='evil.Evil'"),
        ("--data.sources=[{kind: {class_path: evil.Evil}}]", "data.sources[0].kind='evil.Evil'"),
    ],
)
def test_nothing_else_is_made_or_called(evil: Path, word: str, part: str) -> None:
    words = ["--config", "smoke", word]
    request = read_request("run", words)
    quiet()
    with pytest.raises(SettingError) as refused:
        parse(request, ["--config", str(request.configs[0]), word])
    assert part in str(refused.value)
    assert not evil.exists()


def test_what_trainers_are_made_of_is_made() -> None:
    made = Namespace(
        trainer=Namespace(
            callbacks=[Namespace(class_path="lightning.pytorch.callbacks.Timer", init_args=Namespace(duration=None))],
            logger={"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}},
            strategy={"class_path": "lightning.pytorch.strategies.FSDPStrategy",
                      "init_args": {"cpu_offload": {"class_path": "torch.distributed.fsdp.CPUOffload"}}},
        ),
        model=Namespace(
            optimizer=Namespace(class_path="torch.optim.SGD", init_args=Namespace(lr=0.1)),
            lr_scheduler={"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "x"}},
        ),
    )  # fmt: skip
    import torch.distributed.fsdp

    assert torch.distributed.fsdp.CPUOffload
    check_classes(made)
    made.model.optimizer.class_path = "lightning.pytorch.callbacks.Timer"
    with pytest.raises(SettingError, match="is no subclass of Optimizer"):
        check_classes(made)
    made.model.optimizer = faulthandler.dump_traceback
    with pytest.raises(SettingError, match="is no subclass of Optimizer"):
        check_classes(made)


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("--model.memory=abc", "model.memory='abc': must hold settings"),
        ("--model.memory=3", "model.memory=3: must hold settings"),
        ("--model.crossbatch=.nan", "model.crossbatch=nan: "),
        ("--evaluation=[1]", "evaluation=[1]: must hold settings"),
        ("--model.optimizer.init_args.lr=.nan", "model.optimizer.init_args.lr=nan: is not a number"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: must be above 0"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval=0: must be above 0"),
        ("--trainer.val_check_interval=0.0", "trainer.val_check_interval=0.0: must be above 0"),
        ("--model.memory.memory_layers=" + "[" * 3000 + "]" * 3000, "is nested too deeply"),
    ],
)
def test_settings_that_cannot_work_are_named(word: str, part: str) -> None:
    with pytest.raises(SettingError) as refused:
        check_settings(read_request("run", ["--config", "smoke", word]))
    assert part in str(refused.value)


def test_a_file_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 3000 + "]" * 3000, encoding="utf-8")
    with pytest.raises(SettingError, match="is nested too deeply"):
        read_request("run", ["--config", str(tmp_path / "deep.yaml")])
