"""Texts that go on side by side in one batch, each beside a memory of its own, joining and leaving at any token.

Linear layers see all texts as one batch. In attention each text has its own :class:`MemoryCache`, as if it were alone:
nothing is padded, copied or aligned when a text joins or leaves, and texts of different memories share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lightning_fot.model.backbone.layers import following_length
from lightning_fot.model.passes.base import LayerCall, TextPass
from lightning_fot.model.reading.generation import check_progress, forward_cached, while_generating
from lightning_fot.model.reading.windows import read_windows

if TYPE_CHECKING:
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.attention.rotary import Embeddings
    from lightning_fot.model.backbone.attachment import Attachment
    from lightning_fot.model.passes.local_window import MemoryCache
    from lightning_fot.model.passes.recorder import Recorder


class Continuation:
    """One text that goes on: its prompt is read in parts, then :func:`go_on` reads a token at a time.

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


@torch.no_grad()
def go_on(texts: Sequence[Continuation], tokens: Sequence[int]) -> Tensor:
    """Reads one token of each text, in one batch where the model allows that.

    Args:
        texts: At least one, ready, of one model.
        tokens: The token of each: the prompt's last one, then those that were chosen.

    Returns:
        (B, V) logits of the next tokens.
    """
    attached = texts[0].attached
    if len(texts) > 1 and not batches(attached):
        return torch.cat([go_on([text], [token]) for text, token in zip(texts, tokens, strict=True)])
    cache: Any = texts[0].cache if len(texts) == 1 else SideBySide([text.cache for text in texts])
    ids = torch.tensor(tokens, device=attached.device)[:, None]
    logits = forward_cached(attached.model, ids, cache, 1)
    assert logits is not None
    return logits[:, -1]


class SideBySide(Cache, TextPass):
    """Caches of one row each, as the cache of a batch for one forward.

    Args:
        caches: Of the rows, in their order; their layers keep keys alone.
    """

    is_compileable = False

    def __init__(self, caches: Sequence[MemoryCache]) -> None:
        self.caches = caches
        super().__init__(layers=[_Layer(caches, index) for index in range(len(caches[0].layers))])
        # Each row's part of the embeddings that layers are given, by identity; kept with them, so that none is reused.
        self._parts: dict[int, tuple[Embeddings, list[Embeddings]]] = {}

    def begin(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Makes room in each cache; (B, L) ids without padding."""
        for row, cache in enumerate(self.caches):
            cache.begin(ids[row : row + 1])
        # Where a window has moved the keys that stayed are rotated anew: that row needs more columns than others.
        width = max(cache.positions.shape[1] for cache in self.caches)
        self.positions = torch.cat(
            [torch.nn.functional.pad(cache.positions, (width - cache.positions.shape[1], 0)) for cache in self.caches]
        )

    def end(self, completed: bool) -> None:
        """Ends the forward in each cache."""
        for cache in self.caches:
            cache.end(completed)

    def before_rotation(self, call: LayerCall) -> None:
        """Told of each layer without a memory that rotates."""
        for row, cache in enumerate(self.caches):
            cache.before_rotation(self._of_row(call, row))

    def attend(
        self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention (B, H, L, D) of each row over its own local window and memory."""
        outputs = []
        for row, cache in enumerate(self.caches):
            local = cache.local_layers[call.layer_idx]
            own = self._of_row(call, row)
            keys, values = local.keys, local.values
            if call.expand is not None:
                keys, values = call.expand(keys, values)
            outputs.append(cache.attend(own, query[row : row + 1], keys, values, scale, softcap))
        return torch.cat(outputs)

    def _of_row(self, call: LayerCall, row: int) -> LayerCall:
        """The call with that row's part of the embeddings."""
        given = call.position_embeddings
        if given is None:
            return replace(call)
        if id(given) not in self._parts:
            self._parts[id(given)] = (
                given,
                [_own(given, number, cache.positions.shape[1]) for number, cache in enumerate(self.caches)],
            )
        return replace(call, position_embeddings=self._parts[id(given)][1][row])


def _own(embeddings: Embeddings, row: int, width: int) -> Embeddings:
    cos, sin = (part[row : row + 1] if len(part) > 1 else part for part in embeddings)
    return cos[:, cos.shape[1] - width :], sin[:, sin.shape[1] - width :]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of all rows: hands new keys and values to the row's own."""

    def __init__(self, caches: Sequence[MemoryCache], index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers: list[Any] = [cache.layers[index] for cache in caches]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, G, L, D) keys and values; gives them back, since each row attends to all of its own."""
        for row, layer in enumerate(self._layers):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As small as can be: masks are made by the rows' caches."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that the longest text has seen."""
        return max(int(layer.get_seq_length()) for layer in self._layers)

    def get_max_length(self) -> int:
        """-1: texts may go on for ever."""
        return -1
