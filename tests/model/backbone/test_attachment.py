"""Attaching to and detaching from model classes of transformers, and refusing what cannot be served."""

import pytest
import torch
import transformers

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from tests.support.families import CASES, family
from tests.support.models import settings, tiny_llama, tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_family_equals_its_backbone_and_detaches_bit_for_bit(name):
    model, ids = family(*CASES[name]), tokens(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        tolerance = 1e-4 * float(before.std())
        with attach_memory(model, settings()) as lm:
            torch.testing.assert_close(lm(ids).logits, before, atol=tolerance, rtol=1e-4)
            # Reading a memory, crossbatch training and cached decoding with an overlap work on every family.
            long = tokens(1, 48)
            read = lm(long).logits
            shown = lm.crossbatch(long.view(3, 16), [[], [0], [0, 1]])
            torch.testing.assert_close(shown.view_as(read), read, atol=50 * tolerance, rtol=1e-3)
        with attach_memory(model, settings(overlap=4)) as lm:
            generated = lm.generate(ids, max_new_tokens=10, do_sample=False)
            assert torch.equal(lm(generated).logits[:, 11:-1].argmax(-1), generated[:, 12:])
        assert torch.equal(model(ids).logits, before)


def test_parameters_keep_their_names_and_values():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm = attach_memory(model, settings())
    assert lm.state_dict().keys() == before.keys()
    lm.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_plain_model_stays_usable_while_attached():
    model, ids = tiny_llama(), tokens(1, 30)
    with torch.no_grad():
        expected = model(ids).logits
        decoded = model.generate(ids, max_new_tokens=5, do_sample=False)
        with attach_memory(model, settings()):
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), decoded)


def test_eager_attention_is_kept():
    model, ids = tiny_llama(attn_implementation="eager"), tokens(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        with attach_memory(model, settings()) as lm:
            torch.testing.assert_close(lm(ids).logits, before, atol=1e-5, rtol=1e-5)
            lm(tokens(1, 40))
        assert model.config._attn_implementation == "eager"
        assert torch.equal(model(ids).logits, before)


def test_bfloat16_models_are_served():
    model = tiny_llama().to(torch.bfloat16)
    with attach_memory(model, settings(top_k=8)) as lm, torch.no_grad():
        out = lm(tokens(1, 40))
    assert out.logits.dtype == torch.bfloat16
    assert out.memory.layers[1].keys.dtype == torch.bfloat16


def test_layers_of_chunks_or_of_narrow_windows_cannot_be_memory_layers():
    kinds = ["sliding_attention", "full_attention", "chunked_attention", "full_attention"]
    model = family("Gemma2", {**CASES["Gemma2"][1], "layer_types": kinds[:2] * 2, "sliding_window": 8})
    with pytest.raises(SettingError, match=r"window=16: layer 0 .* sees 8 tokens back.*at most 8"):
        attach_memory(model, settings(memory_layers=[0], window=16))
    model.config.layer_types = kinds
    with pytest.raises(SettingError, match=r"layer 2 .* chunked attention.*\[0, 1, 3\]"):
        attach_memory(model, settings(memory_layers=[2]))
    model.config.layer_types = kinds[:2] * 2
    with attach_memory(model, settings(memory_layers=[1, 3], overlap=4)) as lm, torch.no_grad():
        ids = tokens(1, 12)
        torch.testing.assert_close(lm(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_a_soft_cap_that_the_backbone_leaves_out_is_named():
    model = family(*CASES["Gemma2"])
    # As transformers up to 5.18 does by itself; later ones give such a model eager attention.
    model.config._attn_implementation = "sdpa"
    with pytest.raises(SettingError, match=r"soft cap.*attn_implementation=.eager."):
        attach_memory(model, settings())


def test_models_that_cannot_be_served_are_refused_and_left_as_they_were():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    before = model(tokens(1, 8)).logits
    try:
        lm = attach_memory(model, MemoryConfig(memory_layers=[1], window=16))
    except SettingError as error:
        assert "model.backbone" in str(error)  # noqa: PT017  (either outcome is right, if it is honest)
    else:
        lm.detach()
    assert torch.equal(model(tokens(1, 8)).logits, before)


def test_attaching_twice_is_refused():
    model = tiny_llama()
    with attach_memory(model, settings()), pytest.raises(SettingError, match="already"):
        attach_memory(model, settings())


@pytest.mark.parametrize("layers", [[4], [-5], [1, 1], [1, -3]])
def test_layers_that_do_not_exist_or_repeat_are_named(layers):
    with pytest.raises(SettingError, match="memory_layers"):
        attach_memory(tiny_llama(), settings(memory_layers=layers))


def test_negative_layers_count_from_the_end():
    with attach_memory(tiny_llama(), settings(memory_layers=[-1, -3])) as lm:
        assert lm.memory_layers == (1, 3)


def test_a_detached_model_says_so():
    lm = attach_memory(tiny_llama(), settings())
    lm.detach()
    with pytest.raises(SettingError, match="detached"):
        lm(tokens(1, 4))


def test_a_gate_mixes_memory_and_local_context():
    model, ids = tiny_llama(), tokens(1, 48)
    with attach_memory(model, settings(attending="gate")) as lm:
        assert set(lm.gates) == {"1", "3"}
        lm.crossbatch(ids.view(3, 16), [[], [0], [0, 1]]).square().mean().backward()
        assert all(float(gate.grad.abs().max()) > 0 for gate in lm.gates.values())
        with torch.no_grad():
            mixed = lm(ids).logits
            for gate in lm.gates.values():
                gate.fill_(-1e9)
            shut = lm(ids).logits
            local = torch.cat([model(part).logits for part in ids.split(16, dim=1)], dim=1)
    torch.testing.assert_close(shut, local, atol=1e-4, rtol=1e-4)
    assert float((mixed - shut)[:, 16:].abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("retriever", "message"),
    [
        ("hnws", "is not an installed retriever. Did you mean hnsw"),
        ({"name": "hnsw", "M": -3}, r"retriever\.M=-3: must be a whole number from 2 to 512"),
        (
            {"name": "hnsw", "efsearch": 64},
            r"efsearch=64: is not an argument of hnsw. Did you mean ef_search",
        ),
        ({"layers": {1: "exact"}}, "lacks layer 3"),
        ({"layers": {1: "exact", 3: {"name": "faiss_ivf", "nlist": 0}}}, r"retriever\.nlist=0: must be"),
    ],
)
def test_a_retriever_that_cannot_be_made_is_refused_when_the_memory_is_attached(retriever, message):
    model = tiny_llama()
    with pytest.raises(SettingError, match=message):
        attach_memory(model, settings(retriever=retriever))
    with attach_memory(model, settings()) as lm:
        assert lm.new_memory().batch_size == 1
