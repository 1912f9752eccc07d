"""A memory belongs to what made it: whatever changes its pairs is told at use and at load; nothing else is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.fingerprint import sampled
from lightning_fot.model.lm import MemoryLM
from lightning_fot.system.digests import KEY, write_sealed
from tests.support.models import settings, tiny_llama, tokens

IDS, QUESTION = tokens(1, 60), tokens(1, 9, seed=1)

# peft asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def one_number(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] += 1.0


def by_way_of_data(model: Any) -> None:
    model.model.layers[2].self_attn.q_proj.weight.data.mul_(1.01)


def new_parameter(model: Any) -> None:
    layer = model.model.layers[1].input_layernorm
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def embeddings(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS[0, 0]] += 1.0


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def data_exchanged(model: Any) -> None:
    weight = model.model.layers[2].self_attn.q_proj.weight
    weight.data = weight.data * 1.01


def new_bias(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(64))


def new_layer(model: Any) -> None:
    layer = model.model.layers[0]
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.LayerNorm(64))


def fused_step(model: Any) -> None:
    """Writes to one row of the embeddings, as training on few tokens does, by a kernel that counts no version."""
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[IDS[0, 0]] = 1.0
    torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True).step()


CHANGES = [
    one_number,
    fused_step,
    by_way_of_data,
    data_exchanged,
    new_parameter,
    new_bias,
    new_layer,
    embeddings,
    buffer,
]


def keys_of(lm: MemoryLM) -> torch.Tensor:
    return lm.ingest(IDS, lm.new_memory()).layers[3].keys


def refuses(lm: MemoryLM, memory: Any) -> None:
    """Every way of using a memory says that the weights are others, and leaves it as it was."""
    before = memory.lengths.tolist()
    for use in (
        lambda: lm(QUESTION, memory=memory),
        lambda: lm(QUESTION, memory=memory, update_memory=True),
        lambda: lm.ingest(QUESTION, memory),
        lambda: lm.generate(QUESTION, memory=memory, max_new_tokens=2),
    ):
        with pytest.raises(SettingError, match="weights"):
            use()
    assert memory.lengths.tolist() == before


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_memory_of_other_weights_is_refused_at_use_and_at_load(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        memory = lm.ingest(IDS, lm.new_memory())
        memory.save(tmp_path / "before")
        old = memory.layers[3].keys.clone()
        change(model)
        assert not torch.allclose(keys_of(lm), old)
        refuses(lm, memory)
        refuses(lm, memory.snapshot())
        # Saved only now, it still is what the old weights made.
        memory.save(tmp_path / "after")
        for folder in ("before", "after"):
            with pytest.raises(SettingError, match="weights differ"):
                lm.load_memory(tmp_path / folder)
    with attach_memory(tiny_llama(), settings()) as lm:
        for folder in ("before", "after"):
            assert torch.equal(lm.load_memory(tmp_path / folder).layers[3].keys, old)


@pytest.mark.parametrize("change", CHANGES)
def test_a_memory_of_another_attachment_is_refused_by_what_differs(change: Callable[[Any], None]) -> None:
    other = tiny_llama()
    change(other)
    with attach_memory(tiny_llama(), settings()) as first, attach_memory(other, settings()) as second:
        refuses(second, first.ingest(IDS, first.new_memory()))


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", 0.5), ("hidden_act", "gelu")], ids=["epsilon", "activation"]
)
def test_the_same_weights_that_compute_otherwise_are_another_model(tmp_path: Path, name: str, value: Any) -> None:
    with attach_memory(tiny_llama(), settings()) as lm, attach_memory(tiny_llama(**{name: value}), settings()) as other:
        memory = lm.ingest(IDS, lm.new_memory())
        memory.save(tmp_path)
        assert not torch.allclose(keys_of(other), memory.layers[3].keys)
        with pytest.raises(SettingError, match=rf"config\.{name}: .* there, {value} here"):
            other(QUESTION, memory=memory)
        with pytest.raises(SettingError, match=rf"config\.{name} differ"):
            other.load_memory(tmp_path)


def test_what_a_configuration_says_of_other_things_does_not_count(tmp_path: Path) -> None:
    changes = {"use_cache": False, "attention_dropout": 0.5, "pretraining_tp": 2}
    with attach_memory(tiny_llama(), settings()) as lm, attach_memory(tiny_llama(**changes), settings()) as other:
        other.model.config.pad_token_id = 3
        memory = lm.ingest(IDS, lm.new_memory())
        memory.save(tmp_path)
        assert torch.equal(other(QUESTION, memory=memory).logits, lm(QUESTION, memory=memory).logits)
        other.load_memory(tmp_path)
        # One that says nothing of it, as those of earlier versions, or of what this version of transformers has not.
        index = json.loads((tmp_path / "memory.json").read_text())
        told = index["fingerprint"]
        index["fingerprint"] = {name: each for name, each in told.items() if not name.startswith("config.")}
        assert len(index["fingerprint"]) < len(told)
        for more in ({}, {"config.something": 7}):
            index["fingerprint"] |= more
            del index[KEY]
            write_sealed(tmp_path / "memory.json", index)
            lm.load_memory(tmp_path)
            index = json.loads((tmp_path / "memory.json").read_text())


@pytest.mark.parametrize("overlap", [0, 4])
def test_one_text_is_read_by_one_set_of_weights(tmp_path: Path, overlap: int) -> None:
    """Changed between two windows, the rest of the text is refused; what was read before is what it was."""
    model = tiny_llama()
    with attach_memory(model, settings(overlap=overlap)) as lm:
        kept = copy.deepcopy(model.state_dict())
        memory, windows = lm.new_memory(), list[int]()

        def meanwhile(tokens: int) -> None:
            windows.append(tokens)
            if len(windows) == 3:
                one_number(model)

        with pytest.raises(SettingError, match="changed while it was read"):
            lm.ingest(IDS, memory, progress=meanwhile)
        with pytest.raises(SettingError, match="changed while it was read"):
            lm.generate(QUESTION, _from(lm, QUESTION), max_new_tokens=60, stopping_criteria=[Changes(model)])
        memory.save(tmp_path)
        model.load_state_dict(kept)
        read = lm.load_memory(tmp_path).layers[3].keys
        assert read.shape[2]
        torch.testing.assert_close(read, keys_of(lm)[:, :, : read.shape[2]])


class Changes(StoppingCriteria):
    """Changes a weight while tokens are generated."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        one_number(self.model)
        return torch.zeros(len(ids), dtype=torch.bool)


def _from(lm: MemoryLM, ids: torch.Tensor) -> Any:
    return lm.ingest(ids, lm.new_memory())


def test_weights_that_are_put_back_make_the_memory_right_again() -> None:
    model = tiny_llama()
    kept = copy.deepcopy(model.state_dict())
    with attach_memory(model, settings()) as lm:
        memory = lm.ingest(IDS, lm.new_memory())
        want = lm(QUESTION, memory=memory).logits
        one_number(model)
        refuses(lm, memory)
        model.load_state_dict(kept)
        assert torch.equal(lm(QUESTION, memory=memory).logits, want)


def test_what_gets_into_no_pair_changes_nothing(tmp_path: Path) -> None:
    model = tiny_llama()
    with attach_memory(model, settings(memory_layers=[1])) as lm:
        memory = lm.ingest(IDS, lm.new_memory())
        memory.save(tmp_path)
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight.add_(1.0)
            model.lm_head.weight.add_(1.0)
        lm(QUESTION, memory=memory)
        assert len(lm.load_memory(tmp_path)) == 60


def test_gates_of_lower_memory_layers_get_into_the_pairs_of_higher_ones() -> None:
    with attach_memory(tiny_llama(), settings(attending="gate")) as lm:
        memory = lm.ingest(IDS, lm.new_memory())
        with torch.no_grad():
            lm.gates["3"].add_(1.0)
        lm(QUESTION, memory=memory)
        with torch.no_grad():
            lm.gates["1"].add_(1.0)
        refuses(lm, memory)


def test_an_empty_memory_belongs_to_whoever_fills_it() -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        memory = lm.new_memory()
        one_number(model)
        lm.ingest(IDS, memory)
        one_number(model)
        refuses(lm, memory)
        memory.reset()
        lm.ingest(IDS, memory)
        lm(QUESTION, memory=memory)


def test_what_a_call_leaves_is_refused_where_its_weights_are_gone(tmp_path: Path) -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        memory = lm(IDS).memory
        memory.save(tmp_path)
        memory = lm(IDS).memory
        one_number(model)
        lost = lm(IDS).memory
        lm(QUESTION, memory=lost)
        one_number(model)
        refuses(lm, memory)
        for each in (memory, lost):
            with pytest.raises(SettingError, match="weights"):
                lm(QUESTION, memory=each)
        with pytest.raises(SettingError, match="weights or adapters have changed"):
            lost.save(tmp_path)


def test_memories_of_version_0_1_are_opened(tmp_path: Path) -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        lm.ingest(IDS, lm.new_memory()).save(tmp_path)
        index = json.loads((tmp_path / "memory.json").read_text())
        del index["fingerprint"]["weights_format"], index[KEY]
        index["fingerprint"]["weights"] = sampled(lm.attachment)
        (tmp_path / "memory.json").write_text(json.dumps(index))
        memory = lm.load_memory(tmp_path)
        assert len(memory) == 60
        by_way_of_data(model)
        refuses(lm, memory)
        with pytest.raises(SettingError, match="weights differ"):
            lm.load_memory(tmp_path)


def lora(model: Any, name: str, seed: int) -> Any:
    """The model with an adapter that does something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=8, task_type="CAUSAL_LM")
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, part in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                part.copy_(0.3 * torch.randn(part.shape, generator=generator))
    return model.eval()


def test_the_adapters_at_work_belong_to_what_made_it(tmp_path: Path) -> None:
    model = lora(lora(tiny_llama(), "one", 1), "two", 2)
    with attach_memory(model, settings()) as lm:
        model.set_adapter("one")
        memory = lm.ingest(IDS, lm.new_memory())
        memory.save(tmp_path / "one")
        want = lm(QUESTION, memory=memory).logits
        for other in (lambda: model.disable_adapter(), lambda: nullcontext(model.set_adapter("two"))):
            with other():
                refuses(lm, memory)
                with pytest.raises(SettingError, match="weights differ"):
                    lm.load_memory(tmp_path / "one")
        model.set_adapter("one")
        assert torch.equal(lm(QUESTION, memory=memory).logits, want)
        # One that is not at work changes nothing.
        with torch.no_grad():
            for path, part in model.named_parameters():
                if ".two." in path:
                    part.add_(1.0)
        assert torch.equal(lm(QUESTION, memory=lm.load_memory(tmp_path / "one")).logits, want)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("one", 3.0)
        refuses(lm, memory)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("one", 1.0)
        lm(QUESTION, memory=memory)
        model.merge_adapter()
        refuses(lm, memory)


def test_a_backbone_beside_adapters_that_rest_is_the_backbone(tmp_path: Path) -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.ingest(IDS, lm.new_memory()).save(tmp_path)
        want = keys_of(lm)
    model = lora(tiny_llama(), "one", 1)
    with attach_memory(model, settings()) as lm:
        with pytest.raises(SettingError, match="weights differ"):
            lm.load_memory(tmp_path)
        with model.disable_adapter():
            assert torch.equal(lm.load_memory(tmp_path).layers[3].keys, want)
