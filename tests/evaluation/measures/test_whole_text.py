"""Readings without a memory: full context in one window, and rectified positions, against oracles in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.config import EvaluationConfig, RopeSettings
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures import whole_text
from lightning_fot.evaluation.measures.scoring import score_continuations
from lightning_fot.evaluation.measures.whole_text import read_whole
from lightning_fot.model.attention.rectified import rectified_attention
from lightning_fot.model.backbone.stretch import stretch_positions
from lightning_fot.training.module import FocusedTransformer
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens
from tests.support.pair_oracle import causal, pair_logits, plain_frequencies, turned

LENGTH, LIMIT = 60, 7
RECTIFIED = {"name": "rectified", "max_distance": LIMIT}


def _read(lm, ids: Tensor, keep: int, reading: str = "full_context") -> Tensor:
    return torch.cat(list(read_whole(lm, ids, keep, reading)))


def _clamped(frequencies: Tensor, limit: int):
    """Scores with distances clamped: the query rotated by the distance, the key not, pair by pair."""

    def score(query: Tensor, key: Tensor) -> Tensor:
        places = torch.arange(len(query))
        distance = (places[:, None] - places).clamp(0, limit)
        return (turned(query[:, None].expand(-1, len(key), -1), distance, frequencies) * key).sum(-1)

    return score


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("chunk", [1, 13, 512])
def test_full_context_is_the_plain_backbone_in_one_call(make, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunk, and whether or not there are memory layers, which see nothing."""
    monkeypatch.setattr(whole_text, "CHUNK", chunk)
    model, ids = make(), tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits[0]
    for layers in ([], [1, 3]):
        with attach_memory(model, settings(memory_layers=layers)) as lm:
            found = _read(lm, ids[0], 25)
            if chunk == 512:
                assert torch.equal(found, expected[-25:])
            torch.testing.assert_close(found, expected[-25:], atol=2e-5, rtol=2e-5)


def test_full_context_respects_layers_with_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_text, "CHUNK", 8)
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=WINDOW)).eval()
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits[0]
    with attach_memory(model, MemoryConfig(memory_layers=[], window=LENGTH)) as lm:
        torch.testing.assert_close(_read(lm, ids[0], LENGTH), expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(SettingError, match="max_distance"):
        attach_memory(model, MemoryConfig(memory_layers=[], window=LENGTH, attending={**RECTIFIED, "max_distance": 4}))


def test_dynamic_positions_are_those_of_the_whole_text_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a longer text, whose frequencies transformers would keep."""
    monkeypatch.setattr(whole_text, "CHUNK", 16)
    ids = tokens(1, LENGTH)
    model = tiny_llama()
    stretch_positions(model, RopeSettings("dynamic", 2, original_length=32))
    with torch.no_grad():
        short, whole = model(ids[:, :20]).logits, model(ids).logits[0]
        with attach_memory(model, settings(memory_layers=[])) as lm:
            _read(lm, tokens(1, 100)[0], 1)
            torch.testing.assert_close(_read(lm, ids[0], LENGTH), whole, atol=2e-5, rtol=2e-5)
            assert torch.equal(model(ids[:, :20]).logits, short)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_rectified_distances_are_clamped(chunk: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_text, "CHUNK", chunk)
    model, ids = tiny_llama(kv_heads), tokens(2, LENGTH)
    config = settings(memory_layers=[], window=LENGTH, attending=RECTIFIED)
    with torch.no_grad(), attach_memory(model, config) as lm:
        for row in range(2):
            score = _clamped(plain_frequencies(model), LIMIT)
            expected = pair_logits(model, ids[row].tolist(), score, causal(LENGTH))
            assert float((_read(lm, ids[row], LENGTH) - expected).abs().max()) < 2e-4
            # Reading a window and training on it are the same thing.
            assert float((lm(ids).logits[row] - expected).abs().max()) < 2e-4
            assert float((lm.crossbatch(ids, [[], []])[row] - expected).abs().max()) < 2e-4
    with torch.no_grad():
        assert float((model(ids).logits[row] - expected).abs().max()) > 0.1


def test_rectified_within_the_limit_is_the_backbone() -> None:
    model, ids = tiny_llama(), tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits
        for limit in (LENGTH - 1, LENGTH, 4 * LENGTH):
            with attach_memory(
                model, settings(memory_layers=[], window=LENGTH, attending={**RECTIFIED, "max_distance": limit})
            ) as lm:
                torch.testing.assert_close(lm(ids).logits, expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(model(ids).logits, expected)


def test_rectified_positions_stack_on_stretched_ones() -> None:
    """YaRN scales rotated vectors: the clamped pairs get the same factor."""
    model, ids = tiny_llama(), tokens(1, LENGTH)
    stretch_positions(model, RopeSettings("yarn", 4, original_length=32))
    inverse = model.model.rotary_emb.inv_freq.double()
    factor = 0.1 * math.log(4) + 1
    expected = pair_logits(
        model, ids[0].tolist(), lambda q, k: factor**2 * _clamped(inverse, LIMIT)(q, k), causal(LENGTH)
    )
    config = settings(memory_layers=[], window=LENGTH, attending=RECTIFIED)
    with torch.no_grad(), attach_memory(model, config) as lm:
        assert float((lm(ids).logits[0] - expected).abs().max()) < 2e-4


def test_rectified_gradients_and_chunks_of_queries() -> None:
    """Distances are clamped for queries that are the last of more keys too; the chunking changes nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 5, 4), (1, 4, 5, 4), (1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 3))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors: Tensor, max_scores: int = 2**20) -> Tensor:
        return rectified_attention(*tensors, 3, scale=0.7, softcap=2.0, max_scores=max_scores)

    assert torch.autograd.gradcheck(run, inputs)
    for max_scores in (1, 40, 100):
        torch.testing.assert_close(run(*inputs, max_scores=max_scores), run(*inputs))


def test_rectified_trains_with_gradient_checkpointing() -> None:
    ids, found = tokens(2, LENGTH), []
    for checkpointing in (False, True):
        config = settings(memory_layers=[], window=LENGTH, attending=RECTIFIED)
        module = FocusedTransformer("tiny-random-llama", config, trainable="all", gradient_checkpointing=checkpointing)
        module.train()
        module.configure_model()
        module.lm.crossbatch(ids, [[], []]).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in module.lm.model.parameters()])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain, replayed)


@pytest.mark.parametrize("change", [{"memory_layers": [1]}, {"overlap": 4}, {"sink_tokens": 2}])
def test_rectified_positions_with_pairs_that_have_no_distance_are_refused(change) -> None:
    with pytest.raises(SettingError, match="max_distance=7"):
        MemoryConfig(**{"memory_layers": [], "attending": RECTIFIED, **change})


def test_what_cannot_be_read_so_is_named() -> None:
    for readings in ([], ["whole"]):
        with pytest.raises(SettingError, match="readings="):
            EvaluationConfig(readings=readings)
    with pytest.raises(SettingError, match="stand in a memory"):
        EvaluationConfig(readings=["full_context"], distractor_tokens=[64])
    with pytest.raises(SettingError, match="needs the backbone's positions"):
        EvaluationConfig(readings=["full_context"]).check_readings(MemoryConfig(positions="none"))
    for memory in (MemoryConfig(overlap=8), MemoryConfig(memory_layers=[])):
        with pytest.raises(SettingError, match="previous_window is for local windows"):
            EvaluationConfig(readings=["previous_window"]).check_readings(memory)
    model = tiny_llama()
    config = MemoryConfig(memory_layers=[], attending=RECTIFIED)
    with attach_memory(model, config) as lm, pytest.raises(SettingError, match="while generating"):
        lm.generate(tokens(1, 4), max_new_tokens=2)
    with attach_memory(model, config) as lm, pytest.raises(SettingError, match="is not served while scoring"):
        score_continuations(lm, [1, 2], [[3]])


@pytest.mark.parametrize("overlap", [4, 8])
def test_previous_window_is_attention_in_a_band_that_moves_by_strides(overlap: int) -> None:
    """Transformer-XL: every layer sees the last tokens of the window before, at their true distances."""
    model, ids = tiny_llama(), tokens(1, LENGTH)
    frequencies = plain_frequencies(model)

    def score(query: Tensor, key: Tensor) -> Tensor:
        places = torch.arange(len(query))
        return turned(query, places, frequencies) @ turned(key, places, frequencies).T

    places = torch.arange(LENGTH)
    # The first window is full; each later one brings as many new tokens as do not overlap.
    stride = WINDOW - overlap
    start = torch.where(places < WINDOW, 0, (places - WINDOW) // stride * stride + WINDOW - overlap)
    band = causal(LENGTH).masked_fill(places < start[:, None], -math.inf)
    expected = pair_logits(model, ids[0].tolist(), score, band)
    with attach_memory(model, settings(memory_layers=[], overlap=overlap)) as lm:
        assert float((_read(lm, ids[0], LENGTH, "previous_window") - expected).abs().max()) < 2e-4
        assert float((_read(lm, ids[0], 5, "previous_window") - expected[-5:]).abs().max()) < 2e-4
