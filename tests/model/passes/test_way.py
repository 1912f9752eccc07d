"""A way of attending that only this file knows: served by attach, call, training, evaluation and saving."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fot import (
    CrossbatchConfig,
    EvaluationConfig,
    FocusedTransformer,
    MemoryConfig,
    attach_memory,
    attach_pretrained,
)
from lightning_fot.config.attending import registry
from lightning_fot.config.attending.base import Attending
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.scoring import plain_tokens
from lightning_fot.evaluation.measures.whole_text import read_whole
from lightning_fot.model.attention.softmax import attend
from lightning_fot.model.passes import way as ways
from lightning_fot.model.passes import ways as shipped_ways
from lightning_fot.model.passes.base import LayerCall, Pass
from lightning_fot.model.passes.way import WayOfAttending
from lightning_fot.training.batch_logits import batch_logits
from tests.support.markdown_blocks import ROOT, blocks, section
from tests.support.models import WINDOW, settings, tiny_llama, tokens
from tests.support.pair_oracle import causal, pair_logits, plain_frequencies, rotary_score

WIDTH = 5


@dataclass
class Settings(Attending):
    """Every layer sees the last ``width`` tokens."""

    name: ClassVar[str] = "sliding"
    reading: ClassVar[str | None] = "a sliding window"
    goes_on: ClassVar[bool] = False
    width: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise SettingError("model.memory.attending.width", self.width, "shows no token", "Use at least 1.")

    def check_training(self, memory, crossbatch: CrossbatchConfig) -> None:
        if crossbatch.layout == "paper":
            raise SettingError("model.crossbatch.layout", "paper", "shows nothing to sliding windows", "Use packed.")

    def plain_tokens(self, window: int) -> int:
        return min(window, self.width)


class SlidingPass(Pass):
    """Queries and keys come rotated, keys of a KV cache too."""

    serves_all_layers: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def __init__(self, width: int) -> None:
        self.width = width

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        last, width = key.shape[2], query.shape[2]
        distance = torch.arange(last - width, last)[:, None] - torch.arange(last)
        mask = ((distance >= 0) & (distance < self.width))[None, None]
        return attend(query, key, value, scale=scale, mask=mask, softcap=softcap, dropout=call.dropout)


class SlidingWay(WayOfAttending):
    settings_type = Settings
    settings: Settings

    def plain_passes(self, tokens: int, device: torch.device) -> list[Pass]:
        return [SlidingPass(tokens)]

    def window_pass(self, length: int, device: torch.device) -> Pass:
        return SlidingPass(self.settings.width)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ways.register(SlidingWay)
    yield
    del ways._WAYS["sliding"], registry._REGISTERED["sliding"]


def _config(**changes) -> MemoryConfig:
    return settings(**{"memory_layers": [], "attending": {"name": "sliding", "width": WIDTH}, **changes})


def _expected(model, ids: Tensor) -> Tensor:
    places = torch.arange(len(ids))
    band = causal(len(ids)).masked_fill(places[:, None] - places >= WIDTH, -torch.inf)
    return pair_logits(model, ids.tolist(), rotary_score(plain_frequencies(model)), band)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attach_call_and_training_serve_it(kv_heads: int) -> None:
    model, ids = tiny_llama(kv_heads), tokens(2, WINDOW)
    with torch.no_grad():
        plain = model(ids).logits
        with attach_memory(model, _config()) as lm:
            expected = torch.stack([_expected(model, row) for row in ids])
            trained = batch_logits(lm, {"input_ids": ids}, CrossbatchConfig(pack=1, range=0))
            for found in (lm(ids).logits, trained):
                assert float((found - expected).abs().max()) < 2e-4
        assert float((plain - expected).abs().max()) > 0.1
        assert torch.equal(model(ids).logits, plain)


def test_the_evaluation_reads_by_its_name_and_in_full_context() -> None:
    model, ids = tiny_llama(), tokens(1, 2 * WINDOW + 3)[0]
    with attach_memory(model, _config()) as lm, torch.no_grad():
        whole = torch.cat(list(read_whole(lm, ids, len(ids), "full_context")))
        assert float((whole - _expected(model, ids)).abs().max()) < 2e-4
        windows = torch.cat([lm(part[None]).logits[0] for part in ids.split(WINDOW)])
        advanced: list[int] = []
        read = torch.cat(list(read_whole(lm, ids, 7, "sliding", advanced.append)))
        torch.testing.assert_close(read, windows[-7:], atol=2e-5, rtol=2e-5)
        assert sum(advanced) == len(ids)
    EvaluationConfig(readings=["sliding"]).check_readings(_config())
    with pytest.raises(SettingError, match="sliding is for models of"):
        EvaluationConfig(readings=["sliding"]).check_readings(settings())
    assert plain_tokens(_config()) == WIDTH


def test_a_module_trains_with_it_and_gradient_checkpointing() -> None:
    ids, found = tokens(4, WINDOW + 1), []
    for checkpointing in (False, True):
        module = FocusedTransformer(
            "tiny-random-llama",
            _config(),
            CrossbatchConfig(pack=2, range=0),
            trainable="all",
            gradient_checkpointing=checkpointing,
        )
        module.train()
        module.configure_model()
        logits = batch_logits(module.lm, {"input_ids": ids[:, :-1]}, module.crossbatch_config)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append([parameter.grad.clone() for parameter in module.lm.model.parameters()])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_a_saved_model_opens_with_it(tmp_path) -> None:
    ids = tokens(1, WINDOW)
    with attach_memory(tiny_llama(), _config()) as lm, torch.no_grad():
        expected = lm(ids).logits
        lm.save_pretrained(tmp_path / "model")
    with attach_pretrained(str(tmp_path / "model")) as lm, torch.no_grad():
        assert lm.config.attending == {"name": "sliding", "width": WIDTH}
        assert torch.equal(lm(ids).logits, expected)


def test_what_it_refuses_is_named() -> None:
    with attach_memory(tiny_llama(), _config()) as lm, pytest.raises(SettingError, match=r"sliding.*while generating"):
        lm.generate(tokens(1, 4), max_new_tokens=2)
    for change in ({"memory_layers": [1]}, {"overlap": 4}, {"sink_tokens": 2}):
        with pytest.raises(SettingError, match="read alone"):
            attach_memory(tiny_llama(), _config(**change))
    with pytest.raises(SettingError, match="layout='paper'"):
        FocusedTransformer("tiny-random-llama", _config(), CrossbatchConfig(layout="paper"))
    for attending, message in (
        ({"name": "sliding", "widht": 3}, r"attending\.widht=3.*Did you mean.*width"),
        ({"name": "sliding"}, r"width=0: shows no token"),
        ({"name": "slidign"}, r"attending\.name='slidign'.*Did you mean.*sliding"),
        ({"width": 3}, "names no way of attending"),
        ([3], "names no way of attending"),
    ):
        with pytest.raises(SettingError, match=message):
            _config(attending=attending)
    with pytest.raises(ValueError, match="already is a way of attending"):
        registry.register(type("Other", (Attending,), {"name": "sliding"}))


def test_the_self_test_compares_its_passes_with_the_plain_backbone() -> None:
    class WrongWay(SlidingWay):
        def plain_passes(self, tokens: int, device: torch.device) -> list[Pass]:
            return [SlidingPass(1)]

    ways._WAYS["sliding"] = WrongWay
    with pytest.raises(SettingError, match="differ from the plain backbone"):
        attach_memory(tiny_llama(), _config())


def test_a_file_in_the_folder_is_enough(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the page, which has its settings in its own file: they are told when the model is attached."""
    page = (ROOT / "docs" / "extending_passes.md").read_text(encoding="utf-8")
    (tmp_path / "band.py").write_text(blocks(section(page, "A whole one"), "python")[0], encoding="utf-8")
    monkeypatch.setattr(shipped_ways, "__path__", [*shipped_ways.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_shipped", lambda: ("band",))
    model, ids = tiny_llama(), tokens(2, WINDOW)
    config = MemoryConfig(memory_layers=[], window=WINDOW, attending={"name": "band", "width": WIDTH})
    wrong = MemoryConfig(memory_layers=[], window=WINDOW, attending={"name": "band", "widht": WIDTH})
    try:
        with attach_memory(model, config) as lm, torch.no_grad():
            expected = torch.stack([_expected(model, row) for row in ids])
            assert float((lm(ids).logits - expected).abs().max()) < 2e-4
        with pytest.raises(SettingError, match=r"attending\.widht=5.*width"):
            attach_memory(model, wrong)
        with pytest.raises(SettingError, match="while generating"):
            attach_memory(model, config).generate(ids, max_new_tokens=1)
    finally:
        del ways._WAYS["band"], registry._REGISTERED["band"], sys.modules[f"{shipped_ways.__name__}.band"]


def test_settings_are_told_without_torch() -> None:
    """Every shipped way: its name, its settings and its reading."""
    code = (
        "import sys\n"
        "from lightning_fot.config import MemoryConfig\n"
        "from lightning_fot.config.attending import registry\n"
        "assert registry.names() == ['dilated', 'gate', 'previous_window', 'rectified'], registry.names()\n"
        "assert all(registry.find(name).name == name for name in registry.names())\n"
        "assert registry.readings() == {'dilated': 'dilated attention', 'previous_window': 'previous window'}\n"
        "MemoryConfig(attending={'name': 'dilated', 'segments': [8], 'dilations': [1]})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_shipped_way_has_the_settings_of_its_name() -> None:
    for name in registry.names():
        way = ways.find(name)
        assert way.settings_type is registry.find(name)
        assert way.settings_type.name == name


def test_a_model_without_one_attends_as_ever() -> None:
    assert MemoryConfig().way == Attending()
    assert type(ways.way_of(MemoryConfig())) is WayOfAttending
    assert asdict(MemoryConfig())["attending"] is None
