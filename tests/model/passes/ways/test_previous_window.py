"""Transformer-XL as a comparison mode: training is reading, both are a dense band, and no gradient goes back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from lightning_fot import CrossbatchConfig, CrossbatchDataModule, FocusedTransformer, MemoryConfig, attach_memory
from lightning_fot.commands.job.parsing import parse
from lightning_fot.config import RopeSettings
from lightning_fot.config.schedule import ScheduleConfig
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.whole_text import read_whole
from lightning_fot.model.backbone.stretch import stretch_positions
from lightning_fot.model.passes.ways.previous_window import previous_window_logits
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import SHIPPED, read_request
from tests.support.models import settings, tiny_llama, tiny_qwen3, tokens
from tests.support.pair_oracle import causal, pair_logits, plain_frequencies, rotary_score
from tests.support.quiet_trainer import trainer

SEGMENT = 8
LENGTH = 48


def _config(overlap: int = SEGMENT) -> MemoryConfig:
    return settings(memory_layers=[], window=overlap + SEGMENT, overlap=overlap, attending="previous_window")


def _read(lm, ids: Tensor) -> Tensor:
    return torch.cat(list(read_whole(lm, ids, len(ids), "previous_window")))


@pytest.mark.parametrize("overlap", [SEGMENT, 2 * SEGMENT])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_training_and_reading_are_a_dense_band(overlap: int, kv_heads: int) -> None:
    model, ids = tiny_llama(kv_heads), tokens(2, LENGTH)
    places = torch.arange(LENGTH)
    first_seen = places // SEGMENT * SEGMENT - overlap
    band = causal(LENGTH).masked_fill(places < first_seen[:, None], -math.inf)
    with attach_memory(model, _config(overlap)) as lm, torch.no_grad():
        trained = previous_window_logits(lm.attachment, ids)
        for row in range(2):
            expected = pair_logits(model, ids[row].tolist(), rotary_score(plain_frequencies(model)), band)
            assert float((trained[row] - expected).abs().max()) < 2e-4
            assert float((_read(lm, ids[row]) - expected).abs().max()) < 2e-4
        assert float((model(ids).logits[1] - expected).abs().max()) > 0.1


def test_norms_sliding_windows_and_stretched_positions_are_trained_as_they_are_read() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    mistral = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=11)).eval()
    stretched = tiny_llama()
    stretch_positions(stretched, RopeSettings("yarn", 4, original_length=32))
    ids = tokens(1, LENGTH)
    for model in (mistral, stretched, tiny_qwen3()):
        with attach_memory(model, _config()) as lm, torch.no_grad():
            torch.testing.assert_close(
                previous_window_logits(lm.attachment, ids)[0], _read(lm, ids[0]), atol=2e-5, rtol=2e-5
            )


def _segment_by_segment(model, ids: Tensor) -> Tensor:
    """Logits by transformers alone: the KV cache carries what the segment before has left, detached."""
    cache, found = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], SEGMENT):
        places = torch.arange(start, start + SEGMENT)[None]
        part = ids[:, start : start + SEGMENT]
        found.append(model(part, past_key_values=cache, position_ids=places, use_cache=True).logits)
        for layer in cache.layers:
            layer.keys, layer.values = (kept[:, :, -SEGMENT:].detach() for kept in (layer.keys, layer.values))
    return torch.cat(found, dim=1)


def test_gradients_are_those_of_a_detached_kv_cache() -> None:
    model, ids = tiny_llama(), tokens(2, LENGTH)
    labels = tokens(2, LENGTH, seed=1).flatten()
    expected = torch.autograd.grad(
        F.cross_entropy(_segment_by_segment(model, ids).flatten(0, 1), labels), list(model.parameters())
    )
    with attach_memory(model, _config()) as lm:
        loss = F.cross_entropy(previous_window_logits(lm.attachment, ids).flatten(0, 1), labels)
        found = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_previous_window() -> None:
    model, ids, kept = tiny_llama(), tokens(1, 3 * SEGMENT), []
    model.model.embed_tokens.register_forward_hook(lambda *call: kept.append(call[2]))
    with attach_memory(model, _config()) as lm:
        for differentiable in (False, True):
            kept.clear()
            logits = previous_window_logits(lm.attachment, ids, differentiable)
            (gradient,) = torch.autograd.grad(logits[:, 2 * SEGMENT :].square().sum(), kept)
            reached = gradient.abs().sum((1, 2)) > 0
            # Rows are segments. With gradients the first is reached too: by the second, in the layers between.
            assert reached.tolist() == ([True] * 3 if differentiable else [False, False, True])
        with torch.no_grad():
            assert torch.equal(previous_window_logits(lm.attachment, ids, True), logits)


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        module = _module(gradient_checkpointing=checkpointing)
        module.train()
        previous_window_logits(module.lm.attachment, tokens(2, LENGTH)).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in module.lm.model.parameters()])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_one_segment_is_the_plain_backbone() -> None:
    model, ids = tiny_llama(), tokens(3, SEGMENT)
    with torch.no_grad():
        expected = model(ids).logits
        with attach_memory(model, _config()) as lm:
            torch.testing.assert_close(previous_window_logits(lm.attachment, ids), expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(model(ids).logits, expected)


def _module(memory: MemoryConfig | None = None, crossbatch: CrossbatchConfig | None = None, **changes):
    made = FocusedTransformer(
        "tiny-random-llama",
        _config() if memory is None else memory,
        crossbatch or CrossbatchConfig(pack=2, differentiable=False),
        trainable="all",
        **changes,
    )
    made.configure_model()
    return made


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_loss_of_a_batch_is_that_of_reading_its_packs(tmp_path) -> None:
    """Two packs of two rows: two texts of 32 tokens. What validation logs is the same number."""
    module = _module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    ids = torch.randint(3, 259, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:].clone()}
    batch["targets"][0, :5] = -100
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, *(DataLoader([batch], batch_size=None) for _ in range(2)))
    module.eval()
    logits = torch.stack([_read(module.lm, text) for text in batch["input_ids"].reshape(2, 32)])
    expected = float(F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected, abs=1e-5)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected, abs=1e-5)


def test_packs_of_the_data_are_texts_in_one_piece(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(str(number) for number in range(900)), encoding="utf-8")
    data = CrossbatchDataModule(
        [str(tmp_path)], "tiny-random-llama", 16, "packed", batch_size=4, pack=2, cache_dir=str(tmp_path / "c")
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "targets"}
    texts, targets = (batch[name].reshape(2, 32) for name in ("input_ids", "targets"))
    assert torch.equal(texts[0, 1:], targets[0, :-1])


def test_the_configuration_reads_as_it_trains() -> None:
    path = str(SHIPPED / "baselines" / "transformer_xl.yaml")
    request = read_request("run", ["--config", path])
    check_settings(request)
    job = parse(request, ["--config", path])
    memory, crossbatch = job.model.memory_config, job.model.crossbatch_config
    assert (memory.memory_layers, memory.window, memory.overlap) == ([], 512, 256)
    assert (crossbatch.layout, crossbatch.differentiable, job.model.trainable) == ("packed", False, "all")
    assert job.evaluation.readings == ["previous_window"]
    assert memory.attending == {"name": "previous_window"}


@pytest.mark.parametrize(
    ("memory", "crossbatch", "message"),
    [
        ({"memory_layers": [1]}, {}, r"attending='previous_window'.*memory_layers=\[1\]"),
        ({"overlap": 0}, {}, "attending='previous_window'.*overlap=0"),
        ({"sink_tokens": 2}, {}, "attending='previous_window'.*sink_tokens=2"),
        ({"overlap": 4}, {}, "overlap=4.*do not divide window=16"),
        ({}, {"across_ranks": True}, "across_ranks=True"),
        ({}, {"layout": "paper"}, "layout='paper'"),
        ({}, {"schedule": ScheduleConfig()}, "schedule="),
    ],
)
def test_what_cannot_stand_together_is_named(memory, crossbatch, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        FocusedTransformer(
            "tiny-random-llama",
            settings(**{"memory_layers": [], "window": 16, "overlap": 8, "attending": "previous_window", **memory}),
            CrossbatchConfig(**crossbatch),
        )


def test_ids_that_are_no_whole_segments_are_refused() -> None:
    with attach_memory(tiny_llama(), _config()) as lm, pytest.raises(SettingError, match="no whole segments"):
        previous_window_logits(lm.attachment, tokens(1, LENGTH - 1))
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match="previous_window"):
        previous_window_logits(lm.attachment, tokens(1, LENGTH))
