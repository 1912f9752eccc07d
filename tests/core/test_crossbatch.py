"""Crossbatch training: the row tables of the paper and its code, gradients, and its tie to inference."""

import pytest
import torch

from lightning_fot import CrossbatchConfig, attach_memory
from lightning_fot.crossbatch import crossbatch_attention, packed_rows, paper_rows, row_table
from lightning_fot.errors import SettingError
from tests.core.models import WINDOW, settings, tiny_llama, tokens


@pytest.mark.parametrize(
    ("context_range", "stepping", "pack", "seen"),
    [
        (2, False, 1, [0, 1, 2, 2, 2, 2, 2, 2]),
        (3, True, 4, [0, 1, 2, 3, 0, 2, 3, 3]),
        (6, True, 4, [0, 1, 2, 3, 0, 3, 6, 6]),
        (7, True, 4, [0, 1, 2, 3, 0, 3, 6, 7]),
        (2, True, 2, [0, 1, 0, 2, 0, 2, 0, 2]),
        (3, False, 2, [0, 1, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_packed_rows_are_those_of_the_released_code(context_range, stepping, pack, seen):
    table = packed_rows(8, pack, context_range, stepping)
    assert [len(rows) for rows in table] == seen
    assert table == [[row - 1 - back for back in range(len(rows))] for row, rows in enumerate(table)]


def test_the_3b_recipe_has_its_positives_and_negatives():
    table = packed_rows(8, 4, 3, True)[4:]
    assert [(sum(r >= 4 for r in rows), sum(r < 4 for r in rows)) for rows in table] == [(0, 0), (1, 1), (2, 1), (3, 0)]


def test_paper_rows_start_with_the_own_context_and_wrap():
    assert paper_rows(4, 3) == [[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]]
    with pytest.raises(SettingError, match=r"crossbatch\.d=5"):
        row_table(CrossbatchConfig(layout="paper", d=5), 4)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("positions", ["first", "none"])
def test_crossbatch_equals_chunked_inference(kv_heads, positions):
    """Invariant 22: one document cut in rows, each seeing all before it, is long-input inference."""
    ids = tokens(1, 5 * WINDOW)
    with attach_memory(tiny_llama(kv_heads), settings(positions=positions)) as lm, torch.no_grad():
        read = lm(ids).logits
        trained = lm.crossbatch(ids.view(5, WINDOW), [list(range(row)) for row in range(5)])
    torch.testing.assert_close(trained.reshape_as(read), read, atol=5e-5, rtol=5e-5)


def test_paper_layout_with_own_context_equals_reading_two_windows():
    """With d = 1 each row reads its previous window, embedded apart, beside its own."""
    ids = tokens(3, 2 * WINDOW)
    with attach_memory(tiny_llama(), settings(memory_layers=[1])) as lm, torch.no_grad():
        read = lm(ids).logits[:, WINDOW:]
        trained = lm.crossbatch(ids[:, WINDOW:], paper_rows(3, 1), ids[:, None, :WINDOW])
    torch.testing.assert_close(trained, read, atol=5e-5, rtol=5e-5)


def test_paper_layout_leaves_out_windows_that_do_not_exist():
    ids = tokens(2, WINDOW)
    previous = tokens(2, WINDOW, seed=1)[:, None]
    with attach_memory(tiny_llama(), settings()) as lm, torch.no_grad():
        none = lm.crossbatch(ids, paper_rows(2, 2), previous, torch.zeros(2, 1, dtype=torch.bool))
        torch.testing.assert_close(none, lm.crossbatch(ids, [[], []]))


def test_nothing_shown_equals_the_backbone_in_logits_and_gradients():
    ids = tokens(3, WINDOW)
    model = tiny_llama()
    expected = model(ids).logits
    expected.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with attach_memory(model, settings()) as lm:
        logits = lm.crossbatch(ids, [[], [], []])
        logits.square().mean().backward()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def naive(query, key, value, shown_keys, shown_values, table, scale):
    """Query by query, head by head: the formula as written."""
    rows, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    outputs = torch.zeros_like(query)
    for row in range(rows):
        for head in range(heads):
            group = head // repeats
            for place in range(length):
                keys = [key[row, group, : place + 1]] + [shown_keys[seen, group] for seen in table[row]]
                values = [value[row, group, : place + 1]] + [shown_values[seen, group] for seen in table[row]]
                weights = (torch.cat(keys) @ query[row, head, place] * scale).softmax(0)
                outputs[row, head, place] = weights @ torch.cat(values)
    return outputs


@pytest.mark.parametrize(("context_range", "stepping", "pack"), [(2, False, 1), (3, True, 4), (2, True, 2)])
def test_attention_equals_a_naive_reference(context_range, stepping, pack):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    query, key, value = random(4, 4, 5, 8), random(4, 2, 5, 8), random(4, 2, 5, 8)
    shown_keys, shown_values = random(4, 2, 5, 8), random(4, 2, 5, 8)
    table = packed_rows(4, pack, context_range, stepping)
    fast = crossbatch_attention(query, key, value, shown_keys, shown_values, table, scale=0.3)
    torch.testing.assert_close(fast, naive(query, key, value, shown_keys, shown_values, table, 0.3))


def test_gradient_reaches_shown_keys_and_values_and_no_others():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 4, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    shown_keys, shown_values = (
        torch.randn(3, 2, 4, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    table = [[], [0], [0]]
    out = crossbatch_attention(query, key, value, shown_keys, shown_values, table, scale=0.3)
    for row in range(3):
        gradients = torch.autograd.grad(
            out[row].square().sum(), (shown_keys, shown_values), retain_graph=True, allow_unused=True
        )
        for gradient in gradients:
            reached = [] if gradient is None else [n for n in range(3) if float(gradient[n].abs().max()) > 0]
            assert reached == table[row]
    assert torch.autograd.gradcheck(
        lambda k, v: crossbatch_attention(query, key, value, k, v, table, scale=0.3), (shown_keys, shown_values)
    )
    detached = crossbatch_attention(query, key, value, shown_keys, shown_values, table, scale=0.3, differentiable=False)
    assert torch.equal(detached, out)
    assert not detached.requires_grad


def test_no_row_sees_the_future_through_two_memory_layers():
    ids = tokens(4, WINDOW)
    other = ids.clone()
    other[2, 3] = (other[2, 3] + 1) % 101
    table = packed_rows(4, 4, 3, True)
    with attach_memory(tiny_llama(), settings()) as lm, torch.no_grad():
        difference = (lm.crossbatch(ids, table) - lm.crossbatch(other, table)).abs().amax(-1)
    assert float(difference[:2].max()) == 0.0
    assert float(difference[2, :3].max()) < 1e-5
    assert float(difference[3].min()) > 0.0
