"""Texts that go on side by side in one batch, each beside a memory of its own, joining and leaving at any token.

Texts of different memories and of any length share a batch: see :class:`SideBySide`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fot.model.backbone.layers import following_length
from lightning_fot.model.passes.beside.side_by_side import SideBySide
from lightning_fot.model.reading.generation import check_progress, forward_cached, while_generating
from lightning_fot.model.reading.windows import read_windows

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.backbone.attachment import Attachment
    from lightning_fot.model.passes.recorder import Recorder


class Continuation:
    """One text that goes on: its prompt is read in parts, then :class:`Together` reads a token at a time.

    It gets the logits that ``MemoryLM.generate`` computes for that prompt alone.

    Args:
        attached: The model with its memory layers.
        prompt: (T,) int64, on the model's device, T at least 1.
        memory: One row; what the text attends to. It is extended when the local window moves.
        recorder: What is noted; None notes nothing.
    """

    def __init__(self, attached: Attachment, prompt: Tensor, memory: Memory, recorder: Recorder | None = None) -> None:
        self.attached = attached
        self.cache = attached.new_cache(memory, while_generating(attached.config), recorder)
        self._prompt = prompt[None]
        self._before = 0
        last = attached.config.last_context_length
        if last is not None and len(prompt) > attached.config.window:
            self._before = len(prompt) - last
        self._tell()

    @property
    def ready(self) -> bool:
        """Whether all of the prompt but its last token is read."""
        return not self._before and self.cache.seen >= self._prompt.shape[1] - 1

    @torch.no_grad()
    def read_part(self) -> None:
        """Reads the next part of the prompt, about a window, if it is not :attr:`ready`."""
        if self.ready:
            return
        if self._before:
            # As in LongLLaMA: see `MemoryLM.generate`.
            ids, lengths = self._prompt[:, : self._before], torch.tensor([self._before])
            with self.attached.calls.during(recorder=self.cache.recorder):
                for _ in read_windows(self.attached, ids, self.cache.memory, lengths, True, self._before):
                    pass
            self._prompt, self._before = self._prompt[:, self._before :], 0
        else:
            start = self.cache.seen
            stop = min(self._prompt.shape[1] - 1, start + self.cache.room)
            forward_cached(self.attached.model, self._prompt[:, start:stop], self.cache)
            check_progress(self.cache, stop)
        self._tell()

    def _tell(self) -> None:
        if self.ready and self.cache.recorder is not None:
            self.cache.recorder.answering(True)


def batches(attached: Attachment) -> bool:
    """Whether texts of a model can be in one batch: its layers keep keys alone, rotated whatever others have read."""
    return not attached.states.layers and not following_length(attached.model)


class Together:
    """Texts of one model that go on in one batch where the model allows that.

    Args:
        attached: The model with its memory layers.
    """

    def __init__(self, attached: Attachment) -> None:
        self._attached = attached
        self._beside = SideBySide(attached.num_layers)

    @torch.no_grad()
    def go_on(self, texts: Sequence[Continuation], tokens: Sequence[int]) -> Tensor:
        """Reads one token of each text.

        Args:
            texts: At least one, ready. Those that were not there before join, those that are not there now leave.
            tokens: The token of each: the prompt's last one, then those that were chosen.

        Returns:
            (n, V) logits of the next tokens.
        """
        model = self._attached.model
        if not batches(self._attached):
            each = (
                forward_cached(model, self._ids([token]), text.cache, 1)
                for text, token in zip(texts, tokens, strict=True)
            )
            return torch.cat([logits[:, -1] for logits in each if logits is not None])
        self._change(texts)
        if len(texts) == 1:
            logits = forward_cached(model, self._ids(tokens), texts[0].cache, 1)
            assert logits is not None
            return logits[:, -1]
        places = {id(text.cache): place for place, text in enumerate(texts)}
        order = [places[id(cache)] for cache in self._beside.caches]
        logits = forward_cached(model, self._ids([tokens[place] for place in order]), self._beside, 1)
        assert logits is not None
        return logits[torch.tensor(order, device=logits.device).argsort(), -1]

    def _change(self, texts: Sequence[Continuation]) -> None:
        """Lets texts join and leave."""
        wanted = {id(text.cache) for text in texts}
        for cache in [cache for cache in self._beside.caches if id(cache) not in wanted]:
            self._beside.leave(cache)
        there = {id(cache) for cache in self._beside.caches}
        if len(texts) > 1:
            for text in texts:
                if id(text.cache) not in there:
                    self._beside.join(text.cache)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self._attached.device)[:, None]
