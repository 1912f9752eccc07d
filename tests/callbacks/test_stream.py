from __future__ import annotations

import torch

from lightning_fot import CrossbatchConfig
from lightning_fot.callbacks.stream import TextStream
from tests.support.callback_runs import PACK, WINDOW, Rows, stream

PACKED = CrossbatchConfig(pack=PACK)


def filled(text: TextStream, config: CrossbatchConfig = PACKED) -> TextStream:
    for index in range(4):
        text.extend(Rows()[index]["input_ids"], config)
    return text


def test_the_first_stream_goes_on_from_batch_to_batch() -> None:
    assert torch.equal(filled(TextStream(10_000)).ids, stream())
    rows = torch.cat([Rows()[index]["input_ids"][:1] for index in range(4)], dim=1)
    assert torch.equal(filled(TextStream(10_000), CrossbatchConfig(layout="paper")).ids, rows)


def test_the_oldest_or_the_newest_are_kept() -> None:
    most = 3 * WINDOW
    oldest, newest = filled(TextStream(most)), filled(TextStream(most, newest=True))
    assert torch.equal(oldest.ids, stream()[:, :most])
    assert torch.equal(newest.ids, stream()[:, -most:])
    assert oldest.full
    oldest.clear()
    assert not oldest.full
    assert oldest.ids.shape == (1, 0)
