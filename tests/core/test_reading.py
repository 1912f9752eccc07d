"""Reading input of any length: against an independent fp64 oracle, the plain backbone, and itself in pieces."""

import pytest
import torch
from torch.nn import functional as F

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from tests.core.models import VOCABULARY, WINDOW, settings, tiny_llama, tokens
from tests.core.oracle import dense_logits

TOLERANCE = 2e-4  # fp32 against fp64 on logits of spread about 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("length", [1, 7, WINDOW])
def test_short_input_with_empty_memory_equals_the_backbone(length):
    model, ids = tiny_llama(), tokens(2, length)
    expected = model(ids).logits
    with attach_memory(model, settings()) as lm:
        torch.testing.assert_close(lm(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_without_memory_layers_long_input_equals_each_window_alone():
    model, ids = tiny_llama(), tokens(1, 40)
    expected = torch.cat([model(part).logits for part in ids.split(WINDOW, dim=1)], dim=1)
    with attach_memory(model, settings(memory_layers=[])) as lm:
        torch.testing.assert_close(lm(ids).logits, expected)


@pytest.mark.parametrize("positions", ["first", "none"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("length", [64, 59])
def test_all_neighbours_equal_one_dense_pass(positions, kv_heads, length):
    model, ids = tiny_llama(kv_heads), tokens(1, length)
    expected = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3], positions)
    with attach_memory(model, settings(positions=positions)) as lm:
        out = lm(ids)
    assert len(out.memory) == length
    torch.testing.assert_close(out.logits[0].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_top_k_takes_the_largest_inner_products(top_k):
    model, ids = tiny_llama(), tokens(1, 64)
    expected = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3], top_k=top_k)
    with attach_memory(model, settings(top_k=top_k)) as lm:
        logits = lm(ids).logits[0].double()
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_error_falls_as_more_neighbours_are_read():
    model, ids = tiny_llama(), tokens(1, 96)
    full = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3])
    errors = []
    for top_k in (1, 8, 32, 80):
        with attach_memory(model, settings(top_k=top_k)) as lm:
            errors.append(float((lm(ids).logits[0] - full).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("positions", ["first", "none"])
def test_future_tokens_change_nothing(positions):
    ids = tokens(1, 60)
    other = ids.clone()
    other[0, 37] = (other[0, 37] + 1) % VOCABULARY
    with attach_memory(tiny_llama(), settings(positions=positions, top_k=8)) as lm:
        difference = (lm(ids).logits - lm(other).logits).abs()[0].amax(-1)
    # The windows before hold bit for bit; inside the window, fused attention may round elsewhere.
    assert float(difference[:32].max()) == 0.0
    assert float(difference[:37].max()) < 1e-5
    assert float(difference[37:].min()) > 0.0


def test_a_window_retrieves_nothing_of_itself_and_memory_grows_window_by_window():
    ids = tokens(1, 42)
    with attach_memory(tiny_llama(), settings()) as lm:
        lengths = []
        memory = lm.new_memory()
        for part in ids.split(WINDOW, dim=1):
            lm.ingest(part, memory)
            lengths.append(len(memory))
    assert lengths == [16, 32, 42]


def test_ingest_then_read_equals_one_call():
    ids = tokens(2, 70)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        whole = lm(ids)
        memory = lm.new_memory(2)
        seen = []
        lm.ingest(ids[:, :48], memory, progress=seen.append)
        rest = lm(ids[:, 48:], memory=memory)
    torch.testing.assert_close(rest.logits, whole.logits[:, 48:], atol=1e-5, rtol=1e-5)
    assert seen == [32, 32, 32]
    assert len(memory) == 48
    assert len(rest.memory) == 70


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_row_alone(side):
    ids, lengths = tokens(3, 53), [53, 21, 38]
    mask = torch.zeros(3, 53, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(53 - length, 53) if side == "left" else slice(0, length)] = 1
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        out = lm(ids, attention_mask=mask, labels=ids)
        assert out.memory.lengths.tolist() == lengths
        losses = []
        for row in range(3):
            own = mask[row].bool()
            alone = lm(ids[row][own][None])
            torch.testing.assert_close(out.logits[row][own], alone.logits[0], atol=1e-4, rtol=1e-4)
            losses.append(F.cross_entropy(alone.logits[0, :-1], ids[row][own][1:], reduction="sum"))
    expected = sum(losses) / sum(length - 1 for length in lengths)
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)


def test_memory_given_stays_as_it_was_and_questions_do_not_see_each_other():
    text, first, second = tokens(1, 48), tokens(1, 20, seed=1), tokens(1, 24, seed=2)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        memory = lm.ingest(text, lm.new_memory())
        alone = lm(second, memory=memory).logits
        lm(first, memory=memory)
        lm.generate(first, memory=memory, max_new_tokens=20)
        again = lm(second, memory=memory).logits
        assert len(memory) == 48
        lm(first, memory=memory, update_memory=True)
        assert len(memory) == 68
    assert torch.equal(alone, again)


def test_logits_to_keep_and_loss():
    ids = tokens(2, 50)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        full = lm(ids, labels=ids)
        few = lm(ids, logits_to_keep=5)
    torch.testing.assert_close(few.logits, full.logits[:, -5:], atol=1e-5, rtol=1e-5)
    expected = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(full.loss, expected)


def test_order_of_memory_does_not_matter():
    text, question = tokens(1, 64), tokens(1, 12, seed=1)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        memory = lm.ingest(text, lm.new_memory())
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        shuffled = lm.new_memory()
        shuffled.append({n: (part.keys[:, :, order], part.values[:, :, order]) for n, part in memory.layers.items()})
        torch.testing.assert_close(
            lm(question, memory=memory).logits, lm(question, memory=shuffled).logits, atol=1e-5, rtol=1e-5
        )


def test_stored_keys_are_the_keys_before_rotation_bit_for_bit():
    model, ids = tiny_llama(), tokens(1, WINDOW)
    seen = {}
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: seen.update(keys=output)
    )
    with attach_memory(model, settings(memory_layers=[1])) as lm:
        memory = lm(ids).memory
    handle.remove()
    assert torch.equal(memory.layers[1].keys[0], seen["keys"].view(WINDOW, 2, 16).transpose(0, 1))


def test_stored_keys_carry_the_attention_scale_of_yarn():
    scaled = tiny_llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    )
    scale = scaled.model.rotary_emb.attention_scaling
    assert scale != 1
    seen = {}
    scaled.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output))
    with attach_memory(scaled, settings(memory_layers=[1])) as lm:
        memory = lm(tokens(1, WINDOW)).memory
    expected = seen["keys"].view(WINDOW, 2, 16).transpose(0, 1) * scale
    torch.testing.assert_close(memory.layers[1].keys[0], expected)


def test_skip_window_start_leaves_the_first_keys_out():
    ids = tokens(1, 40)
    with attach_memory(tiny_llama(), settings(skip_window_start=2)) as lm:
        assert len(lm(ids).memory) == 40 - 3 * 2


def test_capacity_keeps_the_newest():
    ids = tokens(1, 160)
    with attach_memory(tiny_llama(), settings(memory_layers=[1], capacity=64)) as lm:
        bounded = lm(ids).memory
        assert len(bounded) <= 64
    with attach_memory(tiny_llama(), settings(memory_layers=[1])) as lm:
        full = lm(ids).memory
    kept = len(bounded)
    # Layer 1 is the first memory layer: its keys do not depend on what is retrieved.
    torch.testing.assert_close(bounded.layers[1].keys, full.layers[1].keys[:, :, -kept:])


def test_bfloat16_storage_stays_close():
    ids = tokens(1, 64)
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        exact = lm(ids).logits
    with attach_memory(model, settings(dtype="bfloat16")) as lm:
        out = lm(ids)
        assert out.memory.layers[1].keys.dtype == torch.bfloat16
    assert float((out.logits - exact).abs().max()) < 0.5
    assert float((out.logits - exact).abs().mean()) < 5e-2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 4)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 5)}, "attention_mask"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4)}, "attention_mask"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.zeros(1, 5)}, "labels"),
    ],
)
def test_wrong_input_is_named(arguments, named):
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match=f"^{named}="):
        lm(**arguments)


def test_foreign_or_misfitting_memory_is_refused():
    with attach_memory(tiny_llama(), settings(memory_layers=[2])) as lm:
        foreign = lm.new_memory()
    with attach_memory(tiny_llama(), settings()) as lm:
        with pytest.raises(SettingError, match="memory"):
            lm(tokens(1, 4), memory=foreign)
        with pytest.raises(SettingError, match="rows"):
            lm(tokens(1, 4), memory=lm.new_memory(2))
