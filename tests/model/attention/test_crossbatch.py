"""Crossbatch training: the row tables of the paper and its code, gradients, and its tie to inference."""

import pytest
import torch

from lightning_fot import CrossbatchConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.crossbatch import packed_rows, paper_rows, row_table
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens


@pytest.mark.parametrize(
    ("context_range", "stepping", "pack", "seen"),
    [
        (2, False, 1, [0, 1, 2, 2, 2, 2, 2, 2]),
        (3, True, 4, [0, 1, 2, 3, 0, 2, 3, 3]),
        (6, True, 4, [0, 1, 2, 3, 0, 3, 6, 6]),
        (7, True, 4, [0, 1, 2, 3, 0, 3, 6, 7]),
        (2, True, 2, [0, 1, 0, 2, 0, 2, 0, 2]),
        (3, False, 2, [0, 1, 2, 3, 3, 3, 3, 3]),
        # Not in the table of released settings: its code does not step where a pack is one row.
        (2, True, 1, [0, 1, 2, 2, 2, 2, 2, 2]),
        (0, True, 4, [0] * 8),
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


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("positions", ["first", "none"])
def test_crossbatch_equals_chunked_inference(build, kv_heads, positions):
    """Invariant 22: one document cut in rows, each seeing all before it, is long-input inference."""
    ids = tokens(1, 5 * WINDOW)
    with attach_memory(build(kv_heads), settings(positions=positions)) as lm, torch.no_grad():
        read = lm(ids).logits
        trained = lm.crossbatch(ids.view(5, WINDOW), [list(range(row)) for row in range(5)])
    torch.testing.assert_close(trained.reshape_as(read), read, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_several_previous_windows_equal_reading_them(build):
    """w = 2 with one memory layer: below it windows are read apart in both, so its keys are the same."""
    ids = tokens(2, 3 * WINDOW)
    with attach_memory(build(), settings(memory_layers=[2])) as lm, torch.no_grad():
        read = lm(ids).logits[:, -WINDOW:]
        previous = ids[:, : 2 * WINDOW].view(2, 2, WINDOW)
        trained = lm.crossbatch(ids[:, -WINDOW:], paper_rows(2, 1), previous)
    torch.testing.assert_close(trained, read, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("layout", ["packed", "paper"])
def test_losses_of_rows_reach_the_keys_of_the_rows_they_see_and_no_others(layout):
    """Invariant 24, through the whole model: the projection of a shown row's keys gets a gradient, others' do not."""
    ids = tokens(4, WINDOW)
    previous = tokens(4, WINDOW, seed=1)[:, None]
    table = packed_rows(4, 2, 2, False) if layout == "packed" else paper_rows(4, 2)
    kept = []
    model = tiny_llama()
    with attach_memory(model, settings(memory_layers=[1])) as lm:
        hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, out: kept.append(out))
        logits = lm.crossbatch(ids, table, None if layout == "packed" else previous)
        hook.remove()
        shown = kept[0]
        for row, seen in enumerate(table):
            (grad,) = torch.autograd.grad(logits[row].square().mean(), shown, retain_graph=True)
            reached = {n for n in range(4) if float(grad[n].abs().max()) > 0}
            # In the packed layout a row's own keys are local to it.
            assert reached == set(seen) | ({row} if layout == "packed" else set())


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


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_logits_of_wanted_tokens_are_those_of_all(share):
    ids, previous = tokens(3, WINDOW), tokens(3, WINDOW, seed=1)[:, None]
    wanted = torch.rand(3, WINDOW, generator=torch.Generator().manual_seed(2)) < share
    with attach_memory(tiny_llama(), settings()) as lm:
        every = lm.crossbatch(ids, paper_rows(3, 2), previous)
        some = lm.crossbatch(ids, paper_rows(3, 2), previous, wanted=wanted)
        # The output layer is whole again afterwards.
        torch.testing.assert_close(lm.crossbatch(ids, paper_rows(3, 2), previous), every)
    torch.testing.assert_close(some, every[wanted][None])
