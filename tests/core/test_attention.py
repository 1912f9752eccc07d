"""The one softmax: against sums of exponentials written out, and under changes that must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.attention import Retrieved, Shown, attend


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


def test_merging_by_log_sum_exp_is_the_same_sum():
    query, key, value = random(0, 1, 1, 1, 8), random(1, 1, 1, 1, 8), random(2, 1, 1, 1, 8)
    keys, values = random(3, 1, 1, 7, 8), random(4, 1, 1, 7, 8)
    merged = attend(query, key, value, Shown(keys, values), scale=0.4)
    local = (query @ key.mT * 0.4).logsumexp(-1, keepdim=True)
    far_scores = query @ keys.mT * 0.4
    far, far_out = far_scores.logsumexp(-1, keepdim=True), far_scores.softmax(-1) @ values
    expected = (local.exp() * value + far.exp() * far_out) / (local.exp() + far.exp())
    torch.testing.assert_close(merged, expected)


def test_a_hidden_pair_changes_nothing_and_copies_add_log_n():
    query, key, value = random(0, 1, 2, 3, 8), random(1, 1, 2, 3, 8), random(2, 1, 2, 3, 8)
    keys, values = random(3, 1, 2, 5, 8), random(4, 1, 2, 5, 8)
    valid = torch.tensor([[True, True, True, False, True]])
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(
        attend(query, key, value, Shown(keys, values, valid), scale=0.4),
        attend(query, key, value, Shown(keys[:, :, kept], values[:, :, kept]), scale=0.4),
    )
    twice = attend(query, key, value, Shown(keys.repeat(1, 1, 2, 1), values.repeat(1, 1, 2, 1)), scale=0.4)
    local_scores = (query @ key.mT * 0.4).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -math.inf)
    scores = torch.cat([local_scores, query @ keys.mT * 0.4 + math.log(2)], dim=-1)
    torch.testing.assert_close(twice, scores.softmax(-1) @ torch.cat([value, values], dim=2))


@pytest.mark.parametrize("share", [-1e9, 1e9])
def test_a_shut_or_open_gate_is_one_attention_alone(share):
    query, key, value = random(0, 1, 2, 3, 8), random(1, 1, 2, 3, 8), random(2, 1, 2, 3, 8)
    shown = Shown(random(3, 1, 2, 5, 8), random(4, 1, 2, 5, 8))
    mixed = attend(query, key, value, shown, scale=0.4, gate=torch.full((2,), share))
    local = attend(query, key, value, scale=0.4)
    memory = (query @ shown.keys.mT * 0.4).softmax(-1) @ shown.values
    torch.testing.assert_close(mixed, local if share < 0 else memory)
