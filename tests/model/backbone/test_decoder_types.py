"""Model classes beyond Llama's kind: what is accepted is right, what is refused has its reason."""

from dataclasses import replace

import pytest
import torch
import transformers

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone import deep_test
from lightning_fot.model.passes.local_layer import LocalLayer
from lightning_fot.model.passes.local_window import MemoryCache
from lightning_fot.model.passes.window import WindowPass
from tests.support.decoder_types import tiny
from tests.support.deep import WINDOW, deep_faults
from tests.support.models import settings, tokens

HYBRIDS = ["lfm2", "granitemoehybrid", "qwen3_next", "jamba", "bamba", "nemotron_h", "falcon_h1"]
HYBRIDS += ["kimi_linear", "bailing_hybrid"]
# Transformers goes on from their states one token at a time, and writes them in place.
ONE_BY_ONE = {"jamba", "bamba"}
# The head of the first calls itself a decoder; the others have learned positions, or sinusoidal ones.
OTHERS = ["modernbert-decoder", "gpt2", "opt", "gpt_bigcode", "biogpt"]
# A sink in each softmax; a part of each head rotated; one tensor rotated at a time; eager attention in other rounding.
FORMS = ["gpt_oss", "phi", "stablelm", "persimmon", "gemma4_text", "nanochat", "vaultgemma"]
# Caches hold latents: keys and values of all heads are made of them, and the end of a key is rotated, in one of two
# orders of its dimensions.
LATENTS = ["deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "axk1"]


def _slow_but(names, quick):
    """One of each kind is quick enough for the fast selection: seconds of a core each."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != quick)) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", _slow_but(FORMS, "gpt_oss"))
def test_other_forms_of_attention_are_read_as_by_the_oracle(name):
    assert deep_faults(tiny(name), 3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "gemma4_text", "gpt_oss", "gemma2", "olmo3", "ministral"])
def test_a_layer_that_slides_remembers_where_the_window_fits(name):
    model = tiny(name, sliding_window=WINDOW)
    assert model.config.layer_types[2] == "sliding_attention"
    assert deep_faults(model, 2) == {}


@pytest.mark.parametrize("name", _slow_but(LATENTS, "deepseek_v3"))
def test_latent_attention_is_read_as_by_the_oracle(name):
    assert deep_faults(tiny(name), 3) == {}


def test_pairs_of_latent_attention_are_whole_keys_and_values():
    """A head's key has the part that all heads share behind its own; one value is narrower than a key."""
    with attach_memory(tiny("deepseek_v3"), settings(memory_layers=[3])) as lm:
        memory = lm.ingest(tokens(1, 40), lm.new_memory())
        pairs = memory.layers[3]
        assert (pairs.kv_heads, pairs.key_store.dim, pairs.value_store.dim) == (4, 16, 12)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [None, 6])
@pytest.mark.parametrize(
    ("name", "layer", "changes"),
    [
        ("deepseek_v2", 3, {}),
        ("llama4_text", 3, {}),
        ("llama4_text", 1, {"layer_types": ["full_attention"] * 4}),
    ],
    ids=["latents", "a layer that does not rotate", "a layer that does"],
)
def test_rotation_by_complex_numbers_is_read_as_by_the_oracle(name, layer, changes, distance):
    model = tiny(name, **changes)
    ids = tokens(1, 8)
    before = model(ids).logits
    if distance is not None and name == "llama4_text" and layer == 3:
        with pytest.raises(SettingError, match="constant"):
            attach_memory(model, settings(memory_layers=[3], positions="constant", distance=6))
    else:
        assert deep_faults(model, layer, distance=distance) == {}
    assert torch.equal(model(ids).logits, before)


def test_windows_longer_than_chunks_are_refused():
    model = tiny("llama4_text", attention_chunk_size=12)
    with pytest.raises(SettingError, match="window=16: layers of this backbone see chunks of 12 tokens"):
        attach_memory(model, settings(memory_layers=[3], window=16))


@pytest.mark.parametrize("name", _slow_but(HYBRIDS, "lfm2"))
def test_hybrids_remember_in_their_attention_layers(name):
    faults = deep_faults(tiny(name), 3, states=True)
    if name in ONE_BY_ONE:
        assert "with gradients" in faults.pop("backward")
    assert faults == {}


@pytest.mark.parametrize("name", _slow_but(OTHERS, "gpt2"))
def test_other_decoders_and_positions_are_read_as_by_the_oracle(name):
    assert deep_faults(tiny(name), 2) == {}


def test_layers_of_hybrids_are_numbered_as_in_the_backbone():
    model = tiny("lfm2")
    with attach_memory(model, settings(memory_layers=[-1, 1])) as lm:
        assert lm.memory_layers == (1, 3)
    with pytest.raises(SettingError, match=r"layer 2 of the backbone's 4 has no softmax attention.*\[1, 3\]"):
        attach_memory(model, settings(memory_layers=[2]))


@pytest.mark.slow
def test_beams_of_hybrids_carry_their_states():
    model, ids = tiny("lfm2"), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    with attach_memory(model, settings(memory_layers=[3], window=32)) as lm:
        assert torch.equal(lm.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False), expected)


def test_a_layer_that_asks_twice_is_refused():
    with pytest.raises(SettingError, match="asks for attention 2 times"):
        attach_memory(tiny("diffllama"), settings(memory_layers=[1]))


def test_a_window_longer_than_the_learned_positions_is_refused():
    model = tiny("gpt2", max_position_embeddings=32)
    with pytest.raises(SettingError, match=r"window=33.* learned 32 positions"):
        attach_memory(model, MemoryConfig(memory_layers=[1], window=33))
    with attach_memory(model, MemoryConfig(memory_layers=[1], window=32)) as lm:
        assert lm.generate(tokens(1, 50), max_new_tokens=20, do_sample=False).shape == (1, 70)


@pytest.mark.slow
def test_models_with_masks_of_their_own_making_generate():
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "layer_types": kinds, "initializer_range": 0.2,
    }  # fmt: skip
    image = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=image, mm_tokens_per_image=1, image_token_index=100, boi_token_index=99,
        eoi_token_index=98,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = tokens(1, 12) % 90
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, eos_token_id=None)
    with attach_memory(model, settings(memory_layers=[1], window=32)) as lm:
        assert torch.equal(lm.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), expected)
    with attach_memory(model, settings(memory_layers=[1], overlap=4)) as lm:
        memory = lm.new_memory()
        text = lm.generate(ids, memory, max_new_tokens=20, do_sample=False, eos_token_id=None, update_memory=True)
        assert memory.log.tokens(0, 0, text.shape[1]).tolist() == text[0].tolist()


def test_layers_that_share_their_keys_are_refused():
    model = tiny("gemma4_text", num_kv_shared_layers=2)
    with pytest.raises(SettingError, match=r"layer 3 .* shares its keys"):
        attach_memory(model, settings(memory_layers=[3]))


@pytest.mark.slow
def test_sinks_and_partial_rotation_are_trained_as_they_are_read():
    for name in ("gpt_oss", "phi"):
        ids = tokens(1, 48)
        with attach_memory(tiny(name), settings(memory_layers=[3])) as lm, torch.no_grad():
            shown = lm.crossbatch(ids.view(3, 16), [[], [0], [0, 1]])
            torch.testing.assert_close(shown.view(1, 48, -1), lm(ids).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["jetmoe", "doge"])
def test_what_goes_wrong_beside_a_memory_alone_is_refused(name):
    model, ids = tiny(name), tokens(1, 8)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with pytest.raises(SettingError, match="going on token by token beside a memory fails"):
            attach_memory(model, settings(memory_layers=[3]))
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        (WindowPass, "attend", "reading two windows .* in window 1"),
        (MemoryCache, "_stride", "going on token by token"),
        (LocalLayer, "before_rotation", "going on token by token .* in row 0"),
    ],
)
def test_the_self_test_tells_what_differs(place, name, message, monkeypatch):
    """A part of reading that is taken away is found: nothing of it shows without a memory."""
    whole = getattr(place, name)

    def without(self, *given, **named):
        if place is WindowPass:
            self = replace(self, memory=self.memory.snapshot(), pairs=self.pairs)
            self.memory.reset()
        elif place is LocalLayer:
            self.buffers.pop("plain", None)
        elif place is MemoryCache:
            self.config = replace(self.config, sink_tokens=0)
        return whole(self, *given, **named)

    monkeypatch.setattr(place, name, without)
    # The same model may have been found right before in this process.
    monkeypatch.setattr(deep_test, "_RIGHT", set())
    with pytest.raises(SettingError, match=message):
        attach_memory(tiny("llama"), settings(memory_layers=[1]))
