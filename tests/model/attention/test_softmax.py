"""The one softmax: against sums of exponentials written out, and under changes that must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.memory.found import Retrieved, Shown
from lightning_fot.model.attention.softmax import attend


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(query, key, value, far_keys, far_values, scale, softcap=None):
    """exp / sum of exp over local causal and outside pairs; far_*: (B, G, M, D)."""
    rows, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    out = torch.zeros(rows, heads, length, value.shape[3], dtype=query.dtype)
    offset = key.shape[2] - length
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                g = h // repeats
                keys = torch.cat([key[b, g, : offset + t + 1], far_keys[b, g]])
                values = torch.cat([value[b, g, : offset + t + 1], far_values[b, g]])
                scores = keys @ query[b, h, t] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                out[b, h, t] = (weights[:, None] * values).sum(0) / weights.sum()
    return out


@given(
    rows=st.integers(1, 2),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    length=st.integers(1, 4),
    extra=st.integers(0, 3),
    stored=st.integers(1, 5),
    softcap=st.sampled_from([None, 5.0]),
    max_scores=st.sampled_from([1, 40, 2**20]),
)
@settings(max_examples=40, deadline=None)
def test_one_softmax_over_local_and_shown_pairs(rows, groups, repeats, length, extra, stored, softcap, max_scores):
    query = random(0, rows, groups * repeats, length, 4)
    key, value = random(1, rows, groups, length + extra, 4), random(2, rows, groups, length + extra, 4)
    shown = Shown(random(3, rows, groups, stored, 4), random(4, rows, groups, stored, 4))
    fast = attend(query, key, value, shown, scale=0.5, softcap=softcap, max_scores=max_scores)
    expected = written_out(query, key, value, shown.keys, shown.values, 0.5, softcap)
    torch.testing.assert_close(fast, expected)


def test_retrieving_everything_equals_showing_everything():
    query, key, value = random(0, 2, 4, 3, 8), random(1, 2, 2, 3, 8), random(2, 2, 2, 3, 8)
    keys, values = random(3, 2, 2, 6, 8), random(4, 2, 2, 6, 8)
    retrieved = Retrieved(
        keys[:, :, None].expand(-1, -1, 6, -1, -1),
        values[:, :, None].expand(-1, -1, 6, -1, -1),
        torch.ones(2, 2, 6, 6, dtype=torch.bool),
    )
    torch.testing.assert_close(
        attend(query, key, value, retrieved, scale=0.4), attend(query, key, value, Shown(keys, values), scale=0.4)
    )


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("stored", [1, 7])
def test_merging_by_log_sum_exp_is_the_same_sum(groups, stored):
    """(e^la · oa + e^lc · oc) / (e^la + e^lc), for scores of any size."""
    query, key, value = 9 * random(0, 2, 4, 3, 8), random(1, 2, groups, 3, 8), random(2, 2, groups, 3, 8)
    keys, values = random(3, 2, groups, stored, 8), random(4, 2, groups, stored, 8)
    merged = attend(query, key, value, Shown(keys, values), scale=0.4)
    key, value, keys, values = (part.repeat_interleave(4 // groups, dim=1) for part in (key, value, keys, values))
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    local_scores = (query @ key.mT * 0.4).masked_fill(~causal, -math.inf)
    far_scores = query @ keys.mT * 0.4
    local, far = local_scores.logsumexp(-1, keepdim=True), far_scores.logsumexp(-1, keepdim=True)
    total = torch.logaddexp(local, far)
    expected = (local - total).exp() * (local_scores.softmax(-1) @ value)
    expected += (far - total).exp() * (far_scores.softmax(-1) @ values)
    torch.testing.assert_close(merged, expected)


def test_a_hidden_pair_changes_nothing():
    """A key whose score is minus infinity, whatever it and its value are."""
    query, key, value = random(0, 1, 2, 3, 8), random(1, 1, 2, 3, 8), random(2, 1, 2, 3, 8)
    keys, values = random(3, 1, 2, 5, 8), random(4, 1, 2, 5, 8)
    kept = [0, 1, 2, 4]
    expected = attend(query, key, value, Shown(keys[:, :, kept], values[:, :, kept]), scale=0.4)
    keys[:, :, 3], values[:, :, 3] = 1e3, 1e6
    valid = torch.tensor([[True, True, True, False, True]])
    torch.testing.assert_close(attend(query, key, value, Shown(keys, values, valid), scale=0.4), expected)
    found = Retrieved(
        keys[:, :, None].expand(-1, -1, 3, -1, -1),
        values[:, :, None].expand(-1, -1, 3, -1, -1),
        valid[:, None, None].expand(1, 2, 3, 5),
    )
    torch.testing.assert_close(attend(query, key, value, found, scale=0.4), expected)


@pytest.mark.parametrize("copies", [1, 2, 7])
@pytest.mark.parametrize("groups", [2, 4])
def test_copies_of_the_outside_pairs_add_their_logarithm(copies, groups):
    query, key, value = random(0, 1, 4, 3, 8), random(1, 1, groups, 3, 8), random(2, 1, groups, 3, 8)
    keys, values = random(3, 1, groups, 5, 8), random(4, 1, groups, 5, 8)
    repeated = Shown(keys.repeat(1, 1, copies, 1), values.repeat(1, 1, copies, 1))
    merged = attend(query, key, value, repeated, scale=0.4)
    key, value, keys, values = (part.repeat_interleave(4 // groups, dim=1) for part in (key, value, keys, values))
    local_scores = (query @ key.mT * 0.4).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -math.inf)
    scores = torch.cat([local_scores, query @ keys.mT * 0.4 + math.log(copies)], dim=-1)
    torch.testing.assert_close(merged, scores.softmax(-1) @ torch.cat([value, values], dim=2))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["none", "shown", "retrieved"])
def test_no_chunking_of_queries_changes_the_output(groups, softcap, gated, kind):
    """One query at a time, a few, or all; heads and keys are never cut."""
    query, key, value = random(0, 2, 4, 7, 8), random(1, 2, groups, 9, 8), random(2, 2, groups, 9, 8)
    outside = None
    if kind == "shown":
        outside = Shown(
            random(3, 2, groups, 6, 8), random(4, 2, groups, 6, 8), torch.arange(6) < torch.tensor([[6], [2]])
        )
    elif kind == "retrieved":
        shape = (2, groups, 4 // groups * 7, 5)
        valid = random(5, *shape) > -1
        outside = Retrieved(random(3, *shape, 8), random(4, *shape, 8), valid)
    gate = random(6, 4) if gated else None
    outputs = [
        attend(query, key, value, outside, scale=0.4, softcap=softcap, gate=gate, max_scores=scores)
        for scores in (1, 300, 2**26)
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_dropout_leaves_the_mean_and_takes_outside_pairs_too():
    """With all weights dropped nothing is left; with some, the mean over draws is what it was."""
    query, key, value = random(0, 1, 2, 3, 8), random(1, 1, 2, 3, 8), random(2, 1, 2, 3, 8)
    shown = Shown(random(3, 1, 2, 5, 8), random(4, 1, 2, 5, 8))
    for outside in (None, shown):
        for gate in (None, random(5, 2)):
            kept = attend(query, key, value, outside, scale=0.4, gate=gate)
            assert float(attend(query, key, value, outside, scale=0.4, gate=gate, dropout=1.0).abs().max()) == 0
            torch.manual_seed(0)
            draws = torch.stack(
                [attend(query, key, value, outside, scale=0.4, gate=gate, dropout=0.3) for _ in range(400)]
            )
            error = (draws.mean(0) - kept).abs() / (draws.std(0) / 20)
            assert float(draws.std(0).min()) > 0
            assert float(error.max()) < 4.5


@pytest.mark.parametrize("share", [-1e9, 1e9])
def test_a_shut_or_open_gate_is_one_attention_alone(share):
    query, key, value = random(0, 1, 2, 3, 8), random(1, 1, 2, 3, 8), random(2, 1, 2, 3, 8)
    shown = Shown(random(3, 1, 2, 5, 8), random(4, 1, 2, 5, 8))
    mixed = attend(query, key, value, shown, scale=0.4, gate=torch.full((2,), share))
    local = attend(query, key, value, scale=0.4)
    memory = (query @ shown.keys.mT * 0.4).softmax(-1) @ shown.values
    torch.testing.assert_close(mixed, local if share < 0 else memory)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["shown", "retrieved"])
def test_a_row_without_a_memory_attends_locally_beside_one_that_has_one(gated, kind):
    query, key, value = random(0, 2, 4, 3, 8), random(1, 2, 2, 3, 8), random(2, 2, 2, 3, 8)
    gate = random(6, 4) if gated else None
    if kind == "shown":
        valid = torch.tensor([[True] * 5, [False] * 5])
        outside = Shown(random(3, 2, 2, 5, 8), random(4, 2, 2, 5, 8), valid)
    else:
        valid = torch.ones(2, 2, 6, 5, dtype=torch.bool)
        valid[1] = False
        outside = Retrieved(random(3, 2, 2, 6, 5, 8), random(4, 2, 2, 6, 5, 8), valid)
    beside = attend(query, key, value, outside, scale=0.4, gate=gate)[1:]
    torch.testing.assert_close(beside, attend(query[1:], key[1:], value[1:], scale=0.4, gate=gate))
