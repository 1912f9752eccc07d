"""States of layers that keep one in place of keys (Mamba, gated convolutions), beside a local window that moves.

A state is of the whole text so far: it goes on when the window moves, and never enters the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from lightning_fot.model.passes.columns import Columns
from lightning_fot.model.passes.local_layer import LocalLayer

States = tuple[dict[int, Tensor | None], dict[int, Tensor | None]]


@dataclass(frozen=True)
class StateFacts:
    """Which layers of a backbone keep states.

    Args:
        layers: By layer number, how many states it keeps, and whether it attends too.
        one_by_one: The backbone starts its states anew where several tokens go on at once: they come one by one.
    """

    layers: Mapping[int, tuple[int, bool]] = field(default_factory=dict)
    one_by_one: bool = False


class StateLayer(LinearAttentionLayer):
    """Convolution and recurrent states (B, ...) of one layer; none is written in place."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Takes what a forward adds; returns all that its convolution reads."""
        known = self.conv_states[state_idx]
        if known is not None:
            self.conv_states[state_idx] = known.clone()
        full: Tensor = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Takes the state after a forward."""
        # A backward pass needs the one before.
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient can reach the states."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return any(state is not None and state.requires_grad for state in held)

    def kept(self) -> States:
        """The states as they are: what is done to the layer later does not change them."""
        copies = [
            {number: None if state is None else state.clone() for number, state in states.items()}
            for states in (self.conv_states, self.recurrent_states)
        ]
        return copies[0], copies[1]

    def restore(self, rows: Tensor, before: States) -> None:
        """Gives the rows (B,) bool the states that they had before."""
        for states, old in zip((self.conv_states, self.recurrent_states), before, strict=True):
            for number, state in states.items():
                if state is None:
                    continue
                chosen = rows.to(state.device).reshape(-1, *[1] * (state.ndim - 1))
                earlier = old[number]
                states[number] = state.where(~chosen, 0 if earlier is None else earlier)

    def select(self, rows: Tensor) -> None:
        """Makes row i what row ``rows[i]`` is; there may be more rows than before."""
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                if state is not None:
                    states[number] = state.index_select(0, rows.to(state.device))


class StateAndLocalLayer(StateLayer, LocalLayer):  # type: ignore[override, no-untyped-call]
    """Of a layer that has both a state and attention."""

    def __init__(self, columns: Columns, unrotated: bool, number_of_states: int) -> None:
        LocalLayer.__init__(self, columns, unrotated)
        StateLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepares states alone: buffers of keys are made by the first keys and values."""
        if kwargs:
            StateLayer.lazy_initialization(self, **kwargs)


def new_layer(columns: Columns, unrotated: bool, states: tuple[int, bool] | None) -> LocalLayer | StateLayer:
    """What a :class:`MemoryCache` keeps of one layer.

    Args:
        columns: Of the cache.
        unrotated: Whether its keys come without rotation: those of memory layers, and latents.
        states: How many states it keeps, and whether it attends too; None keeps keys and values alone.
    """
    if states is None:
        return LocalLayer(columns, unrotated)
    count, attends = states
    return StateAndLocalLayer(columns, unrotated, count) if attends else StateLayer(number_of_states=count)
