"""Backbones from a configuration file: random weights by seed, bytes as tokens, clear errors."""

import json

import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import check_backbone, load_backbone, load_tokenizer

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_weights_are_drawn_by_the_seed_alone(file):
    torch.manual_seed(4)
    state = torch.get_rng_state()
    one, same, other = (load_backbone(name) for name in (file, f"{file}@0", f"{file}@3"))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(one).__name__ == "Qwen3ForCausalLM"
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert load_backbone(file, "bfloat16").dtype == torch.bfloat16
    assert one.get_input_embeddings().num_embeddings == 384


def test_it_reads_bytes_and_takes_a_memory(file):
    info = check_backbone(file)
    assert (info.num_layers, info.vocab_size, info.model_type) == (2, 384, "qwen3")
    ids = load_tokenizer(file)("lookup", return_tensors="pt").input_ids
    with attach_memory(load_backbone(file), MemoryConfig(memory_layers=[1], window=4)) as lm:
        read = lm(ids)
    assert read.logits.shape == (1, 7, 384)
    assert len(read.memory) > 0


def test_attention_with_a_soft_cap_is_one_that_knows_it(tmp_path):
    gemma = {**SMALL, "model_type": "gemma2", "num_attention_heads": 2, "query_pre_attn_scalar": 16}
    (tmp_path / "gemma.json").write_text(json.dumps(gemma))
    model = load_backbone(str(tmp_path / "gemma.json"))
    assert model.config._attn_implementation == "eager"
    model.config.layer_types = ["full_attention"] * 2
    with attach_memory(model, MemoryConfig(memory_layers=[1], window=4)) as lm:
        lm(torch.arange(3, 12)[None])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "has no model_type"),
        (json.dumps({**SMALL, "vocab_size": 100}), "vocab_size=100 is too few"),
        (json.dumps({**SMALL, "model_type": "llamma"}), "makes no model"),
        (json.dumps({**SMALL, "hidden_size": 33, "model_type": "gpt2", "n_head": 2, "n_embd": 33}), "makes no model"),
    ],
)
def test_what_describes_no_model_is_refused(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=message):
        load_backbone(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"model\.backbone=.*nothing\.json@2': no such file"):
        check_backbone(str(tmp_path / "nothing.json@2"))
