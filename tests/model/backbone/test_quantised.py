"""Quantised backbones: served, their scales being weights too, or refused with the reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from tests.support.models import settings, tiny_llama, tokens

QUESTION = tokens(1, 9, seed=2)


def torchao() -> Any:
    quantisation = pytest.importorskip("torchao.quantization")
    model = tiny_llama()
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    return model


def bitsandbytes(folder: Path, **bits: bool) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Multiples of 64, as of real models: where the processor has AVX512-BF16, bitsandbytes cannot pack others.
    tiny_llama(intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(**bits)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def answer(lm: Any, memory: Any) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[int] = lm.generate(QUESTION, memory, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_weights_of_few_bits_are_served_and_known_by_their_scales(kind: str, tmp_path: Path) -> None:
    model = torchao() if kind == "torchao" else bitsandbytes(tmp_path / "model", load_in_4bit=True)
    with attach_memory(model, settings()) as lm:
        memory = lm.ingest(tokens(1, 40), lm.new_memory())
        memory.save(tmp_path / "memory")
        assert answer(lm, lm.load_memory(tmp_path / "memory")) == answer(lm, memory) != answer(lm, lm.new_memory())
    # Other scales of the same numbers are other weights.
    weight = model.model.layers[0].self_attn.k_proj.weight
    scales = weight.scale if kind == "torchao" else weight.quant_state.absmax
    with torch.no_grad():
        scales.mul_(2)
    with attach_memory(model, settings()) as lm, pytest.raises(SettingError, match="weights"):
        lm.load_memory(tmp_path / "memory")


@pytest.mark.filterwarnings("ignore")
def test_eight_bits_whose_outcome_depends_on_the_batch_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = bitsandbytes(tmp_path / "model", load_in_8bit=True)
    with pytest.raises(SettingError, match=r"two windows beside a memory differs.*quantised"):
        attach_memory(model, settings())
