"""Attention to shared windows against the formula as written: outputs, gradients, dtypes, and what is not copied."""

from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fot.memory.partial import attend_part, fused, join, part_gradients
from lightning_fot.model.attention import shared_windows
from lightning_fot.model.attention.crossbatch import crossbatch_attention, packed_rows, paper_rows
from lightning_fot.model.attention.shared_windows import runs_of

SIX = [(2, False, 1), (3, True, 4), (6, True, 4), (7, True, 4), (2, True, 2), (3, False, 2)]
TABLES = {f"packed {setting}": packed_rows(8, setting[2], setting[0], setting[1]) for setting in SIX} | {
    "paper 1": paper_rows(8, 1),
    "paper 3": paper_rows(8, 3),
    "paper 8": paper_rows(8, 8),
    # Rows 0, 2, 3 have no window before theirs: what they would show is left out, and runs have holes.
    "paper, missing": [[other for other in row if other not in (0, 2, 3)] for row in paper_rows(8, 5)],
}
LENGTH, SHOWN, DIM = 6, 5, 8


def inputs(heads, kv_heads, rows=8, dtype=torch.float64, dim=DIM, seed=0):
    """Query, key, value, shown keys and values, laid out as projections leave them; shown windows differ in length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(LENGTH, heads), (LENGTH, kv_heads), (LENGTH, kv_heads), (SHOWN, kv_heads), (SHOWN, kv_heads)]
    made = [torch.randn(rows, length, n, dim, dtype=torch.float64, generator=generator) for length, n in shapes]
    return [tensor.transpose(1, 2).to(dtype).requires_grad_() for tensor in made]


def naive(query, key, value, shown_keys, shown_values, table, scale):
    """Query by query, head by head: the formula as written."""
    rows, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    outputs = []
    for row in range(rows):
        for head in range(heads):
            group = head // repeats
            for place in range(length):
                keys = [key[row, group, : place + 1]] + [shown_keys[seen, group] for seen in table[row]]
                values = [value[row, group, : place + 1]] + [shown_values[seen, group] for seen in table[row]]
                weights = (torch.cat(keys) @ query[row, head, place] * scale).softmax(0)
                outputs.append(weights @ torch.cat(values))
    return torch.stack(outputs).view(rows, heads, length, -1)


def gradients(out, tensors):
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out)
    return torch.autograd.grad((out * weights).sum(), tensors)


@pytest.fixture(params=["fused", "products", "products, few scores at once"])
def kernels(request, monkeypatch):
    """The kernels of this machine, and those that serve a device without them."""
    if request.param != "fused":
        for room in ("memory.partial", "model.attention.shared_windows"):
            monkeypatch.setattr(f"lightning_fot.{room}.fused", lambda *_: False)
    if "few" in request.param:
        monkeypatch.setattr(shared_windows, "MAX_SCORES", 100)


@cache
def formula(table, heads, kv_heads):
    """Output and gradients of the naive reference, made once for all kernels."""
    tensors = inputs(heads, kv_heads)
    out = naive(*tensors, TABLES[table], 0.3)
    return out.detach(), gradients(out, tensors)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3)])
@pytest.mark.parametrize("table", TABLES)
def test_outputs_and_gradients_equal_the_formula(table, heads, kv_heads):
    tensors = inputs(heads, kv_heads)
    out = crossbatch_attention(*tensors, TABLES[table], scale=0.3)
    expected, expected_gradients = formula(table, heads, kv_heads)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(gradients(out, tensors), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("kernels")
def test_gradcheck():
    assert torch.autograd.gradcheck(
        lambda *parts: crossbatch_attention(*parts, [[], [0], [2, 0]], scale=0.3), inputs(4, 2, rows=3), fast_mode=True
    )


def test_number_of_threads_changes_no_gradient():
    """Keys are cut in pieces so that all threads work; pieces of an even share differ from one piece by rounding."""
    tensors = [part.detach()[:, :, :4].requires_grad_() for part in inputs(3, 3, dim=16)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            found.append(gradients(crossbatch_attention(*tensors, TABLES["paper 3"], scale=0.3), tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    tensors = inputs(4, 2, dtype=dtype)
    precise = [tensor.detach().double().requires_grad_() for tensor in tensors]
    table = TABLES["packed (7, True, 4)"]
    out, expected = crossbatch_attention(*tensors, table, scale=0.3), naive(*precise, table, 0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    for found, wanted in zip(gradients(out, tensors), gradients(expected, precise), strict=True):
        assert found.dtype == dtype
        # Sums over rows: errors are measured against the largest.
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < tolerance


def test_autocast_computes_in_its_dtype():
    tensors = inputs(4, 2, dtype=torch.float32)
    table = TABLES["paper 3"]
    expected = crossbatch_attention(*tensors, table, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        out = crossbatch_attention(*tensors, table, scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=0)


def test_detached_windows_get_no_gradient_and_the_output_stays():
    tensors = inputs(4, 2)
    table = TABLES["packed (3, False, 2)"]
    out = crossbatch_attention(*tensors, table, scale=0.3)
    detached = crossbatch_attention(*tensors, table, scale=0.3, differentiable=False)
    assert torch.equal(detached, out)
    whole, without = (
        torch.autograd.grad(result.square().sum(), tensors, allow_unused=True) for result in (out, detached)
    )
    assert without[3] is None
    assert without[4] is None
    for one, same in zip(whole[:3], without[:3], strict=True):
        assert torch.equal(one, same)


def test_gradient_reaches_shown_keys_and_values_and_no_others():
    tensors = inputs(4, 2)
    for name in ("packed (3, True, 4)", "paper 3", "paper, missing"):
        table = TABLES[name]
        out = crossbatch_attention(*tensors, table, scale=0.3)
        for row, seen in enumerate(table):
            found = torch.autograd.grad(out[row].square().sum(), tensors[3:], retain_graph=True, allow_unused=True)
            for gradient in found:
                reached = [] if gradient is None else [n for n in range(8) if float(gradient[n].abs().max()) > 0]
                assert reached == sorted(seen)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_drops_weights_of_the_one_softmax(dropout):
    """With unit vectors as values the output is the weights themselves."""
    heads, rows, table = 2, 4, [[], [0], [0, 1], [0, 2]]
    query, key, _, shown_keys, _ = (part.detach()[:rows] for part in inputs(heads, heads, rows=rows))
    columns = LENGTH + rows * SHOWN
    value = torch.eye(columns, dtype=torch.float64)[:LENGTH].expand(rows, heads, -1, -1)
    shown = torch.eye(columns, dtype=torch.float64)[LENGTH:].view(rows, 1, SHOWN, columns).expand(-1, heads, -1, -1)
    weights = naive(query, key, value, shown_keys, shown, table, 0.3)
    torch.manual_seed(0)
    dropped = crossbatch_attention(query, key, value, shown_keys, shown, table, scale=0.3, dropout=dropout)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / (1 - dropout), 0.0))
    share = float(kept[weights > 0].double().mean())
    assert abs(share - (1 - dropout)) < (0.08 if dropout else 1e-12)


def test_gradcheck_with_dropout():
    def seeded(*parts):
        torch.manual_seed(0)
        return crossbatch_attention(*parts, [[], [0], [0, 2]], scale=0.3, dropout=0.4)

    assert torch.autograd.gradcheck(seeded, inputs(4, 2, rows=3), fast_mode=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_caps_and_gates_equal_the_formula(gated, softcap):
    tensors = [part.detach() for part in inputs(4, 2, rows=4)]
    table = [[], [0], [3, 1], [1, 2]]
    gate = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64) if gated else None
    out = crossbatch_attention(*tensors, table, scale=0.3, softcap=softcap, gate=gate)
    query, key, value, shown_keys, shown_values = tensors
    for row, head, place in [(0, 0, 3), (1, 1, 0), (2, 3, 5), (3, 2, 2)]:
        group, local = head // 2, place + 1
        keys = torch.cat([key[row, group, :local], *(shown_keys[n, group] for n in table[row])])
        values = torch.cat([value[row, group, :local], *(shown_values[n, group] for n in table[row])])
        scores = keys @ query[row, head, place] * 0.3
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        expected = scores.softmax(0) @ values
        if gated and table[row]:
            share = gate[head].sigmoid()
            expected = (1 - share) * scores[:local].softmax(0) @ values[:local]
            expected += share * scores[local:].softmax(0) @ values[local:]
        torch.testing.assert_close(out[row, head, place], expected)


@pytest.mark.parametrize("contiguous", [True, False])
def test_layout_of_inputs_and_of_the_gradient_does_not_matter(contiguous):
    tensors = inputs(4, 2, dtype=torch.float32)
    table = TABLES["paper 3"]
    out = crossbatch_attention(*tensors, table, scale=0.3)
    # Coordinates far apart in memory, and the gradient of a sum: one number for all places.
    others = [(part.contiguous() if contiguous else part.mT.contiguous().mT).detach() for part in tensors]
    others = [part.requires_grad_() for part in others]
    same = crossbatch_attention(*others, table, scale=0.3)
    torch.testing.assert_close(same, out)
    summed = zip(torch.autograd.grad(same.sum(), others), torch.autograd.grad(out.sum(), tensors), strict=True)
    for one, other in summed:
        torch.testing.assert_close(one, other)


def saved_storages(out):
    """Storages that the graph below keeps, each once: address -> bytes."""
    found, waiting, done = {}, [out.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in done:
            continue
        done.add(node)
        for tensor in getattr(node, "saved_tensors", ()):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        waiting += [following for following, _ in node.next_functions]
    return found


def test_windows_are_kept_once_however_many_rows_see_them():
    tensors = inputs(4, 2, dtype=torch.float32)
    given = {part.untyped_storage().data_ptr() for part in tensors}
    kept = {}
    for d in (1, 8):
        out = crossbatch_attention(*tensors, paper_rows(8, d), scale=0.3)
        kept[d] = sum(size for place, size in saved_storages(out).items() if place not in given)
    # The output, and a number for each query and head.
    assert kept[1] == kept[8] == 8 * 4 * LENGTH * (DIM + 1) * 4


def test_runs_join_neighbours_only():
    assert runs_of([2, 1, 0], 4) == [(0, 12)]
    assert runs_of([6, 7, 0, 1], 4) == [(0, 8), (24, 32)]
    assert runs_of([], 4) == []
    # Named twice is seen twice, as the formula has it.
    assert runs_of([1, 1], 4) == [(4, 8), (4, 8)]


def test_parts_join_to_the_whole():
    """Invariant 12: by their log-sum-exps, in any order; a part of score minus infinity changes nothing."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (5, 12, 12))
    expected, expected_lse = attend_part(query, key, value, 0.3)
    out, lse = (part.clone() for part in attend_part(query, key[:, :, 7:], value[:, :, 7:], 0.3))
    join(out, lse, *attend_part(query, key[:, :, :7], value[:, :, :7], 0.3))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    join(out, lse, torch.ones_like(out), torch.full_like(lse, -torch.inf))
    torch.testing.assert_close(out, expected)


def test_kernels_of_gpus_are_called_as_they_want_to_be():
    """Shapes and arguments, checked by torch without a GPU."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 48, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(1, 2, 96, 64, dtype=torch.bfloat16, device="cuda")
        assert fused(query, key)
        out, lse = attend_part(query, key, key, 0.125)
        found = part_gradients(out, query, key, key, out, lse, 0.125)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (1, 2, 48), torch.float32)
    assert [part.shape for part in found] == [query.shape, key.shape, key.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpus_agree_with_the_formula(dtype):
    tensors = [part.detach().cuda().requires_grad_() for part in inputs(4, 2, dtype=dtype, dim=64)]
    precise = [part.detach().double().cpu().requires_grad_() for part in tensors]
    table = TABLES["paper 3"]
    out, expected = crossbatch_attention(*tensors, table, scale=0.1), naive(*precise, table, 0.1)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=0)
    for found, wanted in zip(gradients(out, tensors), gradients(expected, precise), strict=True):
        assert float((found.double().cpu() - wanted).abs().max() / wanted.abs().max()) < tolerance
