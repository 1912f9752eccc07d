"""Local keys and values of one layer of several texts, in tensors that all of them are read from at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fot.model.passes.local_layer import LocalLayer


class RowBuffers:
    """The buffers of one layer of n texts: by name a tensor (n or more, G, C, D).

    The text in row i keeps its own :class:`LocalLayer`, whose buffers are views of row i: what it writes is here, and
    what is written here is its own. A row's columns begin at 0; what lies behind a text's last one is finite, and means
    nothing.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._layers: list[LocalLayer] = []

    def join(self, layer: LocalLayer, width: int) -> None:
        """Takes a text in as the last row, with its first ``width`` columns."""
        row, own = len(self._layers), layer.lasting_buffers()
        for tensor in self._tensors.values():
            # Another text may have left what is not finite: that would spoil sums even where its weight is 0.
            tensor[row : row + 1].zero_()
        self._layers.append(layer)
        layer.shared = self
        for name, buffer in own.items():
            self._reserve(name, buffer, layer.capacity(width))
            self._tensors[name][row, :, :width] = buffer[0, :, :width]
            self._bind(name, row)

    def leave(self, row: int) -> None:
        """Gives a text buffers of its own again; the last row takes its place."""
        layer, last = self._layers[row], self._layers.pop()
        layer.shared = None
        for name, buffer in layer.lasting_buffers().items():
            layer.buffers[name] = buffer.clone()
        if last is not layer:
            self._layers[row] = last
            for name, buffer in last.lasting_buffers().items():
                self._tensors[name][row] = buffer[0]
                self._bind(name, row)
        if not self._layers:
            self._tensors = {}

    def reserve(self, layer: LocalLayer, name: str, like: Tensor, capacity: int) -> Tensor:
        """The row (1, G, C, D) of a text, C at least ``capacity``; what is there stays."""
        row = next(row for row, known in enumerate(self._layers) if known is layer)
        self._reserve(name, like, capacity)
        self._bind(name, row)
        return layer.buffers[name]

    def write(self, name: str, new: Tensor, columns: list[int]) -> None:
        """Writes (n, G, 1, D): of row i into column ``columns[i]``."""
        stop, rows = max(columns) + 1, len(columns)
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor) < rows or tensor.shape[2] < stop:
            tensor = self._reserve(name, new, self._layers[0].capacity(stop))
        if min(columns) == max(columns):
            tensor[:rows, :, columns[0]] = new[:, :, 0]
        else:
            places = torch.tensor(columns, device=tensor.device)
            tensor[torch.arange(rows, device=tensor.device), :, places] = new[:, :, 0]
        for row, layer in enumerate(self._layers):
            if name not in layer.buffers:
                self._bind(name, row)

    @property
    def given(self) -> str:
        """The buffer that new keys are written to."""
        return self._layers[0].given

    def read(self, name: str, width: int) -> Tensor:
        """The first columns (n, G, width, D) of all rows: a view."""
        return self._tensors[name][: len(self._layers), :, :width]

    def _bind(self, name: str, row: int) -> None:
        self._layers[row].buffers[name] = self._tensors[name][row : row + 1]

    def _reserve(self, name: str, like: Tensor, capacity: int) -> Tensor:
        """Makes room for all rows and ``capacity`` columns."""
        old, rows = self._tensors.get(name), len(self._layers)
        if old is not None:
            if len(old) >= rows and old.shape[2] >= capacity:
                return old
            # Twice as many rows as before: joining one by one copies each a few times at most.
            rows = len(old) if len(old) >= rows else 2 * len(old)
            capacity = max(capacity, old.shape[2])
        grown: Tensor = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
        self._tensors[name] = grown
        if old is not None:
            grown[: len(old), :, : old.shape[2]] = old
            for row, layer in enumerate(self._layers):
                if name in layer.buffers:
                    self._bind(name, row)
        return grown
