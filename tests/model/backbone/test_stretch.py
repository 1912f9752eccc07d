"""Stretched rotary positions: each formula of its paper, written out, against the model that transformers makes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.config import RopeSettings
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.stretch import stretch_positions
from lightning_fot.training.module import FocusedTransformer
from tests.support.models import tiny_llama, tokens
from tests.support.pair_oracle import causal, pair_logits, plain_frequencies, rotary_score

TRAINED, FACTOR, LENGTH = 32, 4.0, 80


def _expected(kind: str, plain: Tensor, theta: float) -> tuple[Tensor, float]:
    """Frequencies (D/2,) and the factor on rotated vectors, from the papers."""
    dim = 2 * len(plain)
    if kind == "linear":
        return plain / FACTOR, 1.0
    if kind in ("ntk", "dynamic"):
        stretch = FACTOR if kind == "ntk" else FACTOR * LENGTH / TRAINED - (FACTOR - 1)
        base = theta * stretch ** (dim / (dim - 2))
        return base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)), 1.0
    # YaRN, equations 17 to 22: a ramp between the dimensions that turn 32 times and once within the trained length.
    low, high = (dim * math.log(TRAINED / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / FACTOR * ramp + plain * (1 - ramp), 0.1 * math.log(FACTOR) + 1


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_positions_are_those_of_the_paper(kind: str) -> None:
    model = tiny_llama()
    plain = plain_frequencies(model)
    frequencies, scale = _expected(kind, plain, 10_000.0)
    ids = tokens(1, LENGTH)
    stretch_positions(model, RopeSettings(kind, FACTOR, original_length=TRAINED))
    # With nothing attached, and attached without a memory: positions are a matter of the backbone.
    with torch.no_grad():
        found = model(ids).logits[0]
        with attach_memory(model, MemoryConfig(memory_layers=[], window=LENGTH)) as lm:
            assert torch.equal(lm(ids).logits[0], found)
    expected = pair_logits(model, ids[0].tolist(), rotary_score(frequencies, scale), causal(LENGTH))
    assert float((found - expected).abs().max()) < 2e-4
    assert float((found - pair_logits(model, ids[0].tolist(), rotary_score(plain), causal(LENGTH))).abs().max()) > 0.05


def test_a_factor_of_one_changes_nothing_within_the_trained_length() -> None:
    ids = tokens(1, TRAINED)
    for kind in ("linear", "ntk", "dynamic"):
        model = tiny_llama()
        with torch.no_grad():
            before = model(ids).logits
            stretch_positions(model, RopeSettings(kind, 1, TRAINED))
            torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


def test_a_saved_folder_has_the_positions(tmp_path) -> None:
    model = tiny_llama()
    stretch_positions(model, RopeSettings("yarn", FACTOR, original_length=16))
    assert (model.config.max_position_embeddings, model.config.rope_parameters["factor"]) == (64, FACTOR)
    model.save_pretrained(tmp_path)
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_module_stretches_and_its_checkpoint_says_so() -> None:
    module = FocusedTransformer("tiny-random-llama", rope=RopeSettings("ntk", 2))
    module.configure_model()
    assert module.lm.model.config.max_position_embeddings == 4096
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    json.dumps(checkpoint["lightning_fot"])
    # Whoever opens the checkpoint need not know of it, and another setting is refused.
    other = FocusedTransformer("tiny-random-llama")
    other.on_load_checkpoint(checkpoint)
    assert other.lm.model.config.rope_parameters == module.lm.model.config.rope_parameters
    with pytest.raises(SettingError, match="was made with"):
        FocusedTransformer("tiny-random-llama", rope=RopeSettings("ntk", 3)).on_load_checkpoint(checkpoint)


def test_what_cannot_be_stretched_is_named() -> None:
    for settings in ({"type": "alibi"}, {"factor": 0.5}, {"factor": float("nan")}, {"original_length": 0}):
        with pytest.raises(SettingError, match=f"model.rope.{next(iter(settings))}"):
            RopeSettings(**settings)
    model = tiny_llama()
    with attach_memory(model, MemoryConfig(window=16)), pytest.raises(SettingError, match="has a memory attached"):
        stretch_positions(model, RopeSettings())
    stretch_positions(model, RopeSettings())
    with pytest.raises(SettingError, match="already has rotary positions of type yarn"):
        stretch_positions(model, RopeSettings())
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(SettingError, match="in layers of type"):
        stretch_positions(gemma, RopeSettings())
