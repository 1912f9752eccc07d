"""Run by test_kernels.py, and by ``benchmarks/gpu.py`` on a GPU: ends with an error where a kernel differs from torch.

It says how many cases it saw, and where.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lightning_fot.kernels import gather, scan
from lightning_fot.memory.found import Retrieved
from lightning_fot.model.attention.softmax import attend

DEVICE = "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"
SEARCHES = [
    (queries, size, dim, k, dtype, share)
    for queries, size, dim, k in ((1, 1, 16, 1), (3, 130, 24, 5), (17, 515, 64, 33), (2, 64, 80, 64))
    for dtype in (torch.float32, torch.bfloat16, torch.int8)
    for share in (None,)
] + [(3, 130, 24, 5, torch.float32, 0.5), (3, 70, 24, 9, torch.int8, 0.95)]
SHAPES = ((1, 1, 1, 1, 1, 16), (2, 3, 3, 1, 5, 24), (1, 2, 2, 3, 33, 64), (2, 1, 4, 2, 40, 20))
ATTENTIONS = [(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]


def search(queries: int, size: int, dim: int, k: int, dtype: torch.dtype, share: float | None) -> None:
    """Rows and scores of a whole search, and every group's maximum."""
    generator = torch.Generator().manual_seed(size + k)
    wide = torch.randn(size, dim + 5, generator=generator)
    scales = None
    if dtype == torch.int8:
        keys = (wide * 30).round().clamp(-127, 127).to(torch.int8)[:, :dim]
        scales = (torch.rand(size, generator=generator) + 0.5).half()
    else:
        keys = wide.to(dtype)[:, :dim]
    asked = torch.randn(queries, dim, generator=generator)
    removed = None if share is None else torch.rand(size - 3, generator=generator) < share
    exact = asked.double() @ keys.double().T
    if scales is not None:
        exact = exact * scales.double()
    if removed is not None:
        exact[:, : len(removed)].masked_fill_(removed, float("-inf"))
    padded = torch.nn.functional.pad(exact, (0, -size % scan.GROUP), value=float("-inf"))
    there = [None if one is None else one.to(DEVICE) for one in (asked, scales, removed)]
    # Rows further apart than they are long, on the device too.
    theirs = torch.nn.functional.pad(keys, (0, 5)).to(DEVICE)[:, :dim]
    tops = scan.group_tops(there[0], theirs, there[1], there[2]).cpu()
    assert torch.allclose(tops.double(), padded.view(queries, -1, scan.GROUP).amax(2), rtol=1e-4, atol=1e-3)
    rows, scores = (found.cpu() for found in scan.topk(there[0], theirs, k, there[1], there[2]))
    want = exact.topk(k, dim=1)
    assert torch.allclose(scores.double(), want.values, rtol=1e-4, atol=1e-3)
    assert torch.equal(rows < 0, want.values == float("-inf"))
    found = rows >= 0
    assert torch.allclose(exact.gather(1, rows.clamp_min(0))[found], want.values[found], rtol=1e-4, atol=1e-3)


def attention(batch: int, groups: int, repeats: int, asked: int, found: int, dim: int, dtype: torch.dtype) -> None:
    """Retrieved pairs read where they lie, merged with local attention: one softmax over all, as the reference."""
    generator = torch.Generator().manual_seed(found + dim)
    size, local, scale = 50, 7, dim**-0.5
    keys, values = torch.randn(2, batch * groups, size, dim, generator=generator).to(dtype)
    query = torch.randn(batch, groups * repeats, asked, dim, generator=generator).to(dtype)
    near_keys, near_values = torch.randn(2, batch, groups, local, dim, generator=generator).to(dtype)
    rows = torch.stack(
        [torch.randperm(size, generator=generator)[:found] for _ in range(batch * groups * repeats * asked)]
    ).view(batch * groups, repeats * asked, found)
    rows[torch.rand(rows.shape, generator=generator) < 0.3] = -1
    rows[0, 0] = -1
    folded = query.view(batch * groups, repeats * asked, dim)
    given = (one.to(DEVICE) for one in (folded, keys, values, rows))
    far = tuple(one.cpu() for one in gather.attend_rows(*given, scale))
    seen = near_keys.repeat_interleave(repeats, 1).float()
    scores = (query.float() @ seen.transpose(2, 3)) * scale
    near = scores.softmax(-1) @ near_values.repeat_interleave(repeats, 1).float(), scores.logsumexp(-1)
    whole = gather.merged((near[0].view(folded.shape), near[1].view(folded.shape[:2])), far)[0]

    def taken(pairs: Tensor) -> Tensor:
        places = torch.arange(len(pairs))[:, None, None]
        return pairs[places, rows.clamp_min(0)].view(batch, groups, repeats * asked, found, dim)

    outside = Retrieved(taken(keys), taken(values), (rows >= 0).view(batch, groups, repeats * asked, found))
    mask = torch.ones(1, 1, asked, local, dtype=torch.bool)
    reference = attend(query.float(), near_keys.float(), near_values.float(), outside, scale=scale, mask=mask)
    assert torch.allclose(whole.view(reference.shape), reference, rtol=1e-4, atol=1e-4)
    assert bool((far[0][0, 0] == 0).all())
    assert float(far[1][0, 0]) == float("-inf")


if __name__ == "__main__":
    for case in SEARCHES:
        search(*case)
    for each in ATTENTIONS:
        attention(*each)
    print(f"{len(SEARCHES)} searches, {len(ATTENTIONS)} attentions on {DEVICE}")
