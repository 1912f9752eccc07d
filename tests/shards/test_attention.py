"""Parts of several shards joined, against one softmax in fp64 over the best pairs of all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.shards.attention import attend_scored, attend_shown, capped, joined, winners


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    softcap=st.sampled_from([None, 2.0]),
)
def test_winners_of_shards_are_the_best_of_all(sizes: list[int], k: int, seed: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts, everything = [], []
    for size in sizes:
        scores = torch.randn(2, 1, 3, size, generator=generator)
        values = torch.randn(2, 1, 3, size, 4, generator=generator)
        everything.append((scores, values))
        scores, order = scores.sort(dim=-1, descending=True)
        chosen = values.gather(-2, order[..., None].expand_as(values))
        parts.append((scores[..., :k], chosen[..., :k, :]))
    counts, best, _ = winners([scores for scores, _ in parts], k)
    outs = []
    for count, (scores, values) in zip(counts, parts, strict=True):
        mine = capped(scores, 0.7, softcap).masked_fill(torch.arange(scores.shape[-1]) >= count[..., None], -torch.inf)
        outs.append(attend_scored(mine, values))
    out, lse = joined(outs)
    scores = torch.cat([part for part, _ in everything], -1).double()
    values = torch.cat([part for _, part in everything], -2).double()
    most = min(k, sum(sizes))
    assert best.shape[-1] == most
    if not most:
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())
        return
    top, order = scores.topk(most, dim=-1)
    torch.testing.assert_close(best.double(), top)
    top = capped(top, 0.7, softcap)
    want = top.softmax(-1)[..., None, :] @ values.gather(-2, order[..., None].expand(*order.shape, 4))
    torch.testing.assert_close(out.double(), want[..., 0, :], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), top.logsumexp(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_all_pairs_of_rows_of_different_lengths(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(3, 2, 5, 8, generator=generator), torch.randn(3, 2, 7, 8, generator=generator)
    values = torch.randn(3, 2, 7, 6, generator=generator)
    lengths = [7, 0, 4]
    out, lse = attend_shown(queries, keys, values, lengths, 0.4, softcap)
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == -torch.inf).all())
    for row in (0, 2):
        scores = capped((queries[row] @ keys[row, :, : lengths[row]].mT).double(), 0.4, softcap)
        torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-4)
        want = scores.softmax(-1) @ values[row, :, : lengths[row]].double()
        torch.testing.assert_close(out[row].double(), want, atol=1e-5, rtol=1e-4)
