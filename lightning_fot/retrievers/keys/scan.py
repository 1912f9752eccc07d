"""Exact top-k by inner product, in blocks, and exact rescoring of candidates: pure functions on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fot import kernels
from lightning_fot.retrievers.keys import native
from lightning_fot.retrievers.keys.quantiser import Quantiser

_GROUP = 32
_SCORE_BUDGET = 1 << 22  # scores, or largest scores of groups, held at a time: 16 MB of fp32
_CONVERTED = 8192  # keys converted to float32 at a time
# For many queries, queries and keys of one product, the rows of a group, and numbers gathered at a time (1 MB).
_QUERIES = 512
_WIDTH = 4096
_ROWS = 8
_GATHERED = 1 << 18
_LONGEST = 1 << 17  # keys searched at a time, so that as many queries share each reading however many keys there are


def topk_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of each row in two levels: exact, and several times faster than ``topk`` on long rows.

    The k largest of a row lie in the k groups with the largest maxima. Groups are strided so that the maximum
    vectorises.

    Args:
        scores: (Q, N) float, contiguous.
        k: At most N.

    Returns:
        Values and column numbers, each (Q, k), best first.
    """
    n = scores.shape[1]
    groups = n // _GROUP
    if groups < 4 * k:
        values, columns = scores.topk(k, dim=1)
        return values, columns
    body = scores[:, : groups * _GROUP].view(-1, _GROUP, groups)
    best_groups = body.amax(dim=1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(_GROUP, device=scores.device) * groups
    columns = (best_groups.unsqueeze(1) + offsets.view(1, -1, 1)).flatten(1)
    if n > groups * _GROUP:
        rest = torch.arange(groups * _GROUP, n, device=scores.device).expand(scores.shape[0], -1)
        columns = torch.cat((columns, rest), dim=1)
    values, picked = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, picked)


def topk_rows(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact neighbours of each query by inner product.

    Args:
        queries: (Q, D) float32.
        keys: (N, D), any floating dtype; scored in float32.
        k: Neighbours wanted.

    Returns:
        Row numbers (Q, min(k, N)) int64 and scores float32, best first.
    """
    return topk_blocks(queries, [Block(0, keys)], k)


@dataclass(frozen=True)
class Block:
    """Keys that lie together: as they are, or in eight bits (:class:`~lightning_fot.retrievers.keys.quantiser`).

    Args:
        start: Row number of the first.
        keys: (n, D), any floating dtype, or int8 codes.
        scales: (n,) float16 of codes.
        quantiser: Of codes.
        bank: Whose, in the quantiser.
    """

    start: int
    keys: Tensor
    scales: Tensor | None = None
    quantiser: Quantiser | None = None
    bank: int = 0

    def scores(self, queries: Tensor, first: int, last: int, out: Tensor) -> Tensor:
        """Inner products (Q, last - first) float32 of queries (Q, D) float32 with these keys, written to ``out``."""
        keys = self.keys[first:last]
        if self.scales is None or self.quantiser is None:
            return torch.mm(queries, keys.float().T, out=out)
        return self.quantiser.scores(queries, keys, self.scales[first:last], self.bank, out)

    def parts(self, longest: int) -> Iterator[Block]:
        """The same in pieces of at most ``longest`` keys; nothing is copied."""
        if 0 < len(self.keys) <= longest:
            yield self
            return
        for first in range(0, len(self.keys), longest):
            piece = slice(first, first + longest)
            scales = None if self.scales is None else self.scales[piece]
            yield Block(self.start + first, self.keys[piece], scales, self.quantiser, self.bank)

    def rows(self, numbers: Tensor) -> Tensor:
        """Keys (q, C, D) floating of rows (q, C), numbered from this block's first."""
        flat = numbers.flatten()
        picked = self.keys.index_select(0, flat)
        if self.scales is not None and self.quantiser is not None:
            picked = self.quantiser.decode(picked, self.scales.index_select(0, flat), self.bank)
        return picked.view(*numbers.shape, -1)


def topk_blocks(
    queries: Tensor, blocks: Iterable[Block], k: int, removed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact neighbours of each query among keys that come in blocks.

    Args:
        queries: (Q, D) float32.
        blocks: In the order of their rows; scored in float32.
        k: Neighbours wanted.
        removed: (m,) bool: rows that do not count; those from m on do.

    Returns:
        Row numbers (Q, min(k, N)) int64, -1 where too few count, and scores float32, best first.
    """
    pieces = [piece for block in blocks for piece in block.parts(_LONGEST)] if len(queries) and k else []
    found = [_topk_block(queries, piece, k, removed) for piece in pieces]
    if not found:
        empty = queries.new_zeros(queries.shape[0], 0)
        return empty.long(), empty
    rows, values = found[0]
    if len(found) > 1:
        rows, values = best_of(torch.cat([part[0] for part in found], 1), torch.cat([part[1] for part in found], 1), k)
    return (rows if removed is None else rows.masked_fill(values == float("-inf"), -1)), values


def _topk_block(queries: Tensor, block: Block, k: int, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    count, size = len(queries), len(block.keys)
    # Kernels know one spread and one centre for all keys: vectors that are coded alone have neither.
    alike = block.scales is None or not bool((block.scales < 0).any())
    if alike and queries.device.type == "cpu" and native.suits(block.keys, min(k, size)):
        return _natively(queries, block, min(k, size), removed)
    if alike and kernels.serves(block.keys):
        return _by_kernels(queries, block, min(k, size), removed)
    gone = None if removed is None else _gone(removed[block.start : block.start + size].to(queries.device), size)
    grouped = count * size > _SCORE_BUDGET and size >= 4 * k * _ROWS
    step = max(1, min(_QUERIES, _SCORE_BUDGET * _ROWS // size) if grouped else _SCORE_BUDGET // size)
    search = _by_groups if grouped else _at_once
    parts = [search(queries[row : row + step], block, min(k, size), gone) for row in range(0, count, step)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts])


def _gone(removed: Tensor, size: int) -> Tensor:
    """Removed ones of ``size`` rows: their numbers; on a GPU, where counting them would make the host wait, flags."""
    if removed.device.type in ("cpu", "mps"):
        return removed.nonzero()[:, 0]
    return torch.nn.functional.pad(removed, (0, size - len(removed)))


def _hide(scores: Tensor, gone: Tensor, first: int, last: int) -> None:
    """Makes -inf of the scores (Q, last - first) of removed rows."""
    if gone.dtype == torch.bool:
        scores.masked_fill_(gone[first:last], float("-inf"))
    else:
        scores.index_fill_(1, gone[(gone >= first) & (gone < last)] - first, float("-inf"))


def _by_kernels(queries: Tensor, block: Block, k: int, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    """By Triton, on a GPU."""
    from lightning_fot.kernels.scan import topk

    asked, scales = queries, block.scales
    if scales is not None and block.quantiser is not None:
        asked = queries * block.quantiser.spread[block.bank]
    gone = None if removed is None else removed[block.start :].to(queries.device).contiguous()
    rows, scores = topk(asked.contiguous(), block.keys, k, scales, gone)
    if block.quantiser is not None:
        scores = scores + (queries @ block.quantiser.centre[block.bank])[:, None]
    return torch.where(rows < 0, rows, rows + block.start), scores


def _natively(queries: Tensor, block: Block, k: int, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    """By the compiled library, whose scores never leave the processor."""
    asked, scales = queries, None
    if block.scales is not None and block.quantiser is not None:
        asked, scales = queries * block.quantiser.spread[block.bank], block.scales.contiguous()
    removed = None if removed is None else removed.cpu()
    rows, scores = native.scan(asked.contiguous(), block.keys, k, scales, removed, block.start)
    if scales is not None and block.quantiser is not None:
        scores.add_((queries @ block.quantiser.centre[block.bank])[:, None])
    if block.start:
        rows = rows + block.start if removed is None else torch.where(rows < 0, rows, rows + block.start)
    return rows, scores


def _at_once(queries: Tensor, block: Block, k: int, gone: Tensor | None) -> tuple[Tensor, Tensor]:
    """All scores are kept until the best are known: for few of them."""
    size = len(block.keys)
    scores = queries.new_empty(len(queries), size)
    # What has to be converted to float32 stays in the cache until it is multiplied.
    width = size if block.keys.dtype == torch.float32 else _CONVERTED
    for first in range(0, size, width):
        last = min(size, first + width)
        block.scores(queries, first, last, scores[:, first:last])
    if gone is not None:
        _hide(scores, gone, 0, size)
    values, columns = topk_columns(scores, k)
    return columns + block.start, values


def _by_groups(queries: Tensor, block: Block, k: int, gone: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each group of keys the largest score is kept; the k groups that hold the k best keys are scored again.

    The scores of one product never leave the cache, and are never written to fresh memory. Groups are strided within a
    product, so that the maximum vectorises: twice as fast as groups of neighbours, all in all.
    """
    count, size = len(queries), len(block.keys)
    whole = size // _ROWS * _ROWS
    tops = queries.new_empty(count, whole // _ROWS)
    room = queries.new_empty(count * min(size, _WIDTH))
    for first in range(0, whole, _WIDTH):
        last = min(whole, first + _WIDTH)
        scores = block.scores(queries, first, last, room[: count * (last - first)].view(count, -1))
        if gone is not None:
            _hide(scores, gone, first, last)
        torch.amax(scores.view(count, _ROWS, -1), dim=1, out=tops[:, first // _ROWS : last // _ROWS])
    rows = _members(topk_columns(tops, k)[1], whole)
    values = queries.new_empty(rows.shape)
    step = max(1, _GATHERED // (rows.shape[1] * queries.shape[1]))
    for row in range(0, count, step):
        keys = block.rows(rows[row : row + step]).float()
        # This order of operands is several times faster on CPUs than keys @ query.
        values[row : row + step] = (queries[row : row + step, None] @ keys.transpose(1, 2))[:, 0]
    if whole < size:
        rest = torch.arange(whole, size, device=rows.device).expand(count, -1)
        rows = torch.cat((rows, rest), 1)
        values = torch.cat((values, block.scores(queries, whole, size, queries.new_empty(count, size - whole))), 1)
    if gone is not None and len(gone):
        mask = gone
        if gone.dtype != torch.bool:
            mask = torch.zeros(size, dtype=torch.bool, device=rows.device).index_fill_(0, gone, True)
        values.masked_fill_(mask[rows], float("-inf"))
    rows, values = best_of(rows, values, k)
    return rows + block.start, values


def _members(groups: Tensor, whole: int) -> Tensor:
    """Rows (q, C * _ROWS) of groups (q, C) of products of ``_WIDTH`` rows, the last of them of what is left."""
    first = groups // (_WIDTH // _ROWS) * _WIDTH
    apart = (whole - first).clamp_max(_WIDTH) // _ROWS
    inside = groups - first // _ROWS
    each = torch.arange(_ROWS, device=groups.device)
    return ((first + inside)[..., None] + apart[..., None] * each).flatten(1)


def rescore(queries: Tensor, keys: Tensor | Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Exact scores of candidate rows.

    Args:
        queries: (Q, D) float32.
        keys: (N, D), any floating dtype; or a function that gives keys (q, C, D) for rows (q, C).
        rows: (Q, C) int64; -1 where there is none.

    Returns:
        (Q, C) float32, -inf where the row is -1.
    """
    if rows.numel() == 0:
        return queries.new_zeros(rows.shape)
    # What is gathered stays in the cache until it is multiplied.
    step = max(1, _GATHERED // (rows.shape[1] * queries.shape[1]))
    scores = []
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step].clamp_min(0)
        if isinstance(keys, Tensor):
            gathered = keys.index_select(0, part.flatten()).view(*part.shape, -1)
        else:
            gathered = keys(part)
        # This order of operands is several times faster on CPUs than keys @ query.
        scores.append((queries[first : first + step].unsqueeze(1) @ gathered.float().transpose(1, 2)).squeeze(1))
    return torch.cat(scores).masked_fill_(rows < 0, float("-inf"))


def best_of(rows: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each query, best first.

    Args:
        rows: (Q, C) int64, without duplicates but for -1.
        scores: (Q, C) float32, -inf where the row is -1.
        k: At most C are returned.

    Returns:
        Rows and scores, each (Q, min(k, C)).
    """
    values, picked = scores.topk(min(k, scores.shape[1]), dim=1)
    return rows.gather(1, picked), values


def pad_rows(rows: Tensor, k: int) -> Tensor:
    """Exactly k columns: missing ones are -1."""
    missing = k - rows.shape[1]
    if missing == 0:
        return rows
    return rows[:, :k] if missing < 0 else torch.nn.functional.pad(rows, (0, missing), value=-1)


def stacked(parts: list[Tensor]) -> Tensor:
    """``torch.stack``, but without a copy where there is one part."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
