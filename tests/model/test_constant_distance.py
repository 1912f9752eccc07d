"""``positions: constant``: every query sees all keys of the memory at one distance, and local tokens at their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.backbone import deep_test
from tests.support.decoder_types import tiny
from tests.support.deep import WINDOW as DEEP_WINDOW
from tests.support.deep import deep_faults
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens
from tests.support.stride_oracle import Text, logits_of

# The backbone's angles are fp32.
ANGLES = 1e-4
STRIDE: dict[str, Any] = {"overlap": 5, "sink_tokens": 2}


def constant(distance: int | None, **changes: Any) -> MemoryConfig:
    """All layers of the tiny models, all pairs."""
    return settings(memory_layers="all", positions="constant", distance=distance, **changes)


def oracle(model: Any, ids: Tensor, distance: int, top_k: int | None = None, **stride: Any) -> Tensor:
    """Logits (T, V) in fp64 of the row (T,), read in windows."""
    seen = Text(WINDOW, stride.get("overlap", 0), stride.get("sink_tokens", 0)).read(len(ids)).seen
    return logits_of(model, ids.tolist(), seen, range(4), "constant", distance, top_k)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "distance", "changes"),
    [
        (2, 1, {}),
        (4, 300, STRIDE),
        (2, WINDOW, {**STRIDE, "top_k": 5}),
        (4, 1, {"top_k": 5}),
        (2, 300, {"dense_pairs": 4096, "top_k": 1}),
        (4, WINDOW, {**STRIDE, "dense_pairs": 4096, "top_k": 1}),
    ],
)
def test_reading_is_the_formula_in_double_precision(kv_heads, distance, changes):
    """Also beyond the positions that the model has, and nearer than its window is long."""
    model, ids = tiny_llama(kv_heads).double(), tokens(1, 4 * WINDOW + 3)
    wanted = {**changes, "top_k": None} if "dense_pairs" in changes else changes
    expected = oracle(model, ids[0], distance, **wanted)
    with attach_memory(model, constant(distance, **changes)) as lm, torch.no_grad():
        assert float((lm(ids).logits[0] - expected).abs().max()) < ANGLES


def test_the_window_is_the_distance_where_none_is_given():
    model, ids = tiny_llama().double(), tokens(1, 3 * WINDOW)
    with attach_memory(model, constant(None)) as lm, torch.no_grad():
        assert float((lm(ids).logits[0] - oracle(model, ids[0], WINDOW)).abs().max()) < ANGLES


@pytest.mark.slow
@pytest.mark.parametrize("dense_pairs", [0, 4096])
def test_texts_of_a_batch_go_on_token_by_token_as_by_the_formula(dense_pairs):
    """Prompts of two lengths, padded on the left; windows move while they go on."""
    model, ids = tiny_llama().double(), tokens(2, 2 * WINDOW + 4)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    config = constant(21, dense_pairs=dense_pairs, **STRIDE)
    with attach_memory(model, config) as lm:
        out = lm.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=WINDOW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row in range(2):
        text = out.sequences[row, 7 * row : -1]
        expected = oracle(model, text, 21, **STRIDE)[-WINDOW:]
        assert float((torch.stack(out.logits, 1)[row] - expected).abs().max()) < ANGLES


@pytest.mark.slow
def test_a_saved_memory_answers_as_it_did(tmp_path: Path):
    """Beside the same distance alone; keys on the disk are not rotated, as those of other positions."""
    model, ids, question = tiny_llama().double(), tokens(1, 3 * WINDOW), tokens(1, 6, seed=1)
    caught: list[Tensor] = []
    with attach_memory(model, constant(40)) as lm, torch.no_grad():
        hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: caught.append(call[2]))
        memory = lm.ingest(ids, lm.new_memory())
        hook.remove()
        expected = lm(question, memory=memory).logits
        memory.save(tmp_path / "memory")
    keys = torch.cat(caught, 1).unflatten(-1, (2, -1)).transpose(1, 2)
    assert torch.equal(memory.layers[0].keys, keys)
    with attach_memory(model, constant(40)) as lm, torch.no_grad():
        again = lm.load_memory(tmp_path / "memory")
        assert torch.equal(lm(question, memory=again).logits, expected)
    for other, told in ((constant(41), "distance: 40 there, 41 here"), (settings(memory_layers="all"), "positions")):
        with attach_memory(model, other) as lm, pytest.raises(SettingError, match=told):
            lm(question, memory=memory)


def test_a_crossbatch_is_reading(tmp_path: Path):
    """Rows that are one document, each seeing all rows before it: training would be what reading is, with gradients."""
    model, ids = tiny_llama().double(), tokens(1, 4 * WINDOW)
    with attach_memory(model, constant(9)) as lm:
        rows = lm.crossbatch(ids.view(4, WINDOW), [[], [0], [0, 1], [0, 1, 2]])
        with torch.no_grad():
            read = lm(ids).logits.view_as(rows)
        assert torch.allclose(rows, read, atol=1e-9)
        weight = model.model.layers[0].self_attn.k_proj.weight
        assert float(torch.autograd.grad(rows[3].square().sum(), weight)[0].abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "stablelm", "gemma4_text", "gpt_oss", "deepseek_v3"])
def test_other_forms_of_rotation_are_read_as_by_the_oracle(name):
    """A part of each head rotated, one tensor rotated at a time, scaled rotations and attention sinks."""
    assert deep_faults(tiny(name), 3, distance=DEEP_WINDOW - 1) == {}


@pytest.mark.slow
def test_norms_after_the_projection_are_before_the_rotation():
    assert deep_faults(tiny_qwen3(), 3, distance=DEEP_WINDOW - 1) == {}


def test_a_fault_in_what_the_memory_is_asked_is_found_when_it_is_attached(monkeypatch):
    """The self-test reads beside a memory at this distance: one that is a place too far is not served."""
    from lightning_fot.model.passes.base import LayerCall

    right = LayerCall.asking
    monkeypatch.setattr(LayerCall, "asking", lambda call, query, local: local)
    monkeypatch.setattr(deep_test, "_RIGHT", set())
    with pytest.raises(SettingError, match="beside a memory differs from one dense pass"):
        attach_memory(tiny_llama(), constant(40))
    monkeypatch.setattr(LayerCall, "asking", right)
    attach_memory(tiny_llama(), constant(40)).detach()


def test_models_without_a_rotation_are_refused_by_name():
    with pytest.raises(SettingError, match=r"positions='constant': GPT2LMHeadModel does not rotate.*positions=first"):
        attach_memory(tiny("gpt2"), constant(None))


def test_distances_at_which_frequencies_change_are_refused():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    with pytest.raises(SettingError, match=r"distance=256: is beyond 256 tokens.*below 256"):
        attach_memory(model, constant(256))
    with attach_memory(model, constant(255)) as lm, torch.no_grad():
        assert lm(tokens(1, 40)).logits.shape == (1, 40, 101)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"distance": 0}, r"distance=0"),
        ({"positions": "first", "distance": 5}, r"distance=5.*is not used with positions=first"),
        ({"positions": "far"}, r"positions='far'.*first, none, constant"),
        ({"dense_pairs": -1}, r"dense_pairs=-1"),
        ({"memory_layers": "every"}, r"memory_layers='every'.*list of numbers, or all"),
        ({"attending": {"name": "dilated", "segments": [8], "dilations": [1]}}, r"positions='constant'.*dilated"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, told):
    with pytest.raises(SettingError, match=told):
        replace(constant(None), **changes)


def test_the_plain_model_is_as_before_when_detached():
    model, ids = tiny_llama(), tokens(2, WINDOW)
    expected = model(ids).logits
    with attach_memory(model, constant(50)) as lm:
        assert torch.equal(lm(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
