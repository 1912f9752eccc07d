"""Checkpoints as people have them: precisions, tied heads, shards, GGUF files, adapters on top, processors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_fot import MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import check_backbone, load_backbone, load_tokenizer
from tests.support.decoder_types import tiny
from tests.support.deep import deep_faults
from tests.support.fast_tokenizer import sentence_piece
from tests.support.gguf_files import write_gguf
from tests.support.models import tokens

SIX = ["sliding_attention"] * 5 + ["full_attention"]
CONFIG = MemoryConfig(memory_layers=[-1], window=12, top_k=1000, overlap=4)
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("accelerate") is None, reason="needs gguf and accelerate"
)


def shared(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings().weight
    return head.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "lfm2"])
def test_half_precision_on_the_cpu_reads_as_single_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = tiny(name), tokens(1, 40)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with attach_memory(model, CONFIG) as lm, attach_memory(half, CONFIG) as other, torch.no_grad():
        expected, found = lm(ids).logits, other(ids).logits
        assert found.dtype == dtype
        assert other.new_memory().shape.dtype == dtype
        written = other.generate(ids, max_new_tokens=6, do_sample=False)
    assert written.shape == (1, 46)
    # Of the median token: a router of experts may choose another on its own.
    errors = (found.float() - expected).square().mean(-1).median()
    assert float(errors / expected.var()) ** 0.5 < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_or_not_after_a_round_trip(tied: bool, tmp_path: Path) -> None:
    model, ids = tiny("qwen3", tie_word_embeddings=tied), tokens(1, 30)
    with attach_memory(model, CONFIG) as lm:
        expected = lm(ids).logits
        lm.save_pretrained(tmp_path / "model")
    with attach_pretrained(str(tmp_path / "model")) as lm:
        assert shared(lm.model) == tied
        torch.testing.assert_close(lm(ids).logits, expected)


def test_sharded_weights_are_read_whole_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    model, ids = tiny("mistral", sliding_window=None), tokens(1, 30)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    with attach_memory(model, CONFIG) as lm, attach_memory(load_backbone(str(tmp_path)), CONFIG) as other:
        torch.testing.assert_close(other(ids).logits, lm(ids).logits)
    shards[1].unlink()
    with pytest.raises(SettingError, match=shards[1].name):
        load_backbone(str(tmp_path))


@pytest.mark.slow
@needs_gguf
@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("llama", "llama", {}),
        ("qwen2", "qwen2", {}),
        # Transformers reads no size of heads from the file.
        ("qwen3", "qwen3", {"head_dim": 128}),
        # Nor which layers slide: five of six.
        ("gemma3", "gemma3_text", {"layer_types": SIX, "num_hidden_layers": 6, "query_pre_attn_scalar": 256}),
    ],
)
def test_a_gguf_file_is_a_backbone(kind: str, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiny(name, **changes), tokens(1, 30)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, kind)
    assert check_backbone(str(file)).source == "GGUF file"
    loaded = load_backbone(str(file))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-3, rtol=2e-3)
    assert deep_faults(loaded, next(iter(_full(loaded)))) == {}


def _full(model: PreTrainedModel) -> list[int]:
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


@needs_gguf
def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(SettingError, match=r"broken\.gguf.*cannot be loaded"):
        load_backbone(str(file))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_adapters_on_top_are_read_and_trained_beside_a_memory() -> None:
    peft = pytest.importorskip("peft")
    ids = tokens(1, 40)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("qwen3"), settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    merged = peft.get_peft_model(tiny("qwen3"), settings)
    merged.load_state_dict(model.state_dict())
    plain = merged.merge_and_unload().eval()
    with attach_memory(plain, CONFIG) as lm, torch.no_grad():
        expected = lm(ids).logits
    with attach_memory(model, CONFIG) as lm:
        out = lm(ids, labels=ids)
        torch.testing.assert_close(out.logits, expected, atol=1e-3, rtol=1e-3)
        out.loss.backward()
        assert lm.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 44)
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_processor_is_saved_in_a_tokenizers_place(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    tokenizer = sentence_piece()
    processor = transformers.LlavaProcessor(transformers.CLIPImageProcessorPil(), tokenizer, patch_size=14)
    with attach_memory(tiny("llama"), CONFIG) as lm:
        lm.save_pretrained(tmp_path / "model", processor)
    with attach_pretrained(str(tmp_path / "model")) as lm:
        assert lm.config.window == 12
    found = load_tokenizer(str(tmp_path / "model"))
    assert found("Some words")["input_ids"] == tokenizer("Some words")["input_ids"]
