"""What an attached model is doing right now: the state of a call belongs to the call, not to the model.

Threads and asynchronous tasks that use one model each have their own, since it lives in a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lightning_fot.model.attention.rotary import Embeddings
from lightning_fot.model.passes.base import Pass
from lightning_fot.model.passes.recorder import Recorder


@dataclass(frozen=True)
class CallState:
    """What memory layers do in one call.

    Args:
        current: The pass that they serve; None outside of one.
        replayable: Whether layers will be run again in the backward pass.
        probing: Whether the call only asks what the layers are like.
        recorder: What is noted; None notes nothing.
        score_factor: In place of the model's own factor on scores; None leaves it.
        identities: Rotations that rotate nothing, by the embeddings that they stand for: layers of one forward share
            theirs, so that what is derived from them is made once.
        token: Restores what was before.
    """

    current: Pass | None = None
    replayable: bool = False
    probing: bool = False
    recorder: Recorder | None = None
    score_factor: float | None = None
    identities: dict[int, tuple[Embeddings, Embeddings]] = field(default_factory=dict)
    token: Token[Mapping[int, CallState]] | None = None


_IDLE = CallState()
# By the identity of the ``Calls``: one variable for all models, since variables are never freed.
_STATES: ContextVar[Mapping[int, CallState]] = ContextVar("lightning_fot_calls", default=MappingProxyType({}))


class Calls:
    """The calls in progress of one attached model."""

    @property
    def state(self) -> CallState:
        """Of the call in progress in this thread or task."""
        return _STATES.get().get(id(self), _IDLE)

    def begin(self, **changes: Any) -> Token[Mapping[int, CallState]]:
        """Enters a state that differs from the present one in some fields; :meth:`end` leaves it."""
        before = _STATES.get()
        state = replace(self.state, **{"identities": {}, **changes})
        # The state knows how to go back, and must itself be set to learn it.
        token = _STATES.set(before)
        _STATES.set({**before, id(self): replace(state, token=token)})
        return token

    def end(self, token: Token[Mapping[int, CallState]] | None = None) -> None:
        """Goes back to the state before a :meth:`begin`; None means the last one."""
        token = self.state.token if token is None else token
        if token is not None:
            _STATES.reset(token)

    @contextmanager
    def during(self, **changes: Any) -> Iterator[None]:
        """A state that differs in some fields, inside the block."""
        token = self.begin(**changes)
        try:
            yield
        finally:
            self.end(token)
