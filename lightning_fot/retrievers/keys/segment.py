"""One growing piece of stored vectors, in memory or in a file that the operating system pages in and out."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import BinaryIO, cast
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers.keys.codes import CodeBook

_FIRST_CAPACITY = 256
# Beyond this many rows a buffer grows by half instead of doubling: spare room is memory that nobody uses.
_DOUBLING_ENDS = 65536


class Segment:
    """Vectors of several banks, readable by several stores. A row, once written, never changes.

    In memory a bank is contiguous, for scans. In a file all banks of a row lie together, so that the file grows at its
    end and nothing is moved. The file has no name: it is gone with the process, however that ends.

    Args:
        banks: Key sets.
        dim: Size of a vector.
        dtype: A floating dtype, or ``torch.int8`` with a scale for each vector.
        device: Where the vectors lie.
        folder: Keep the vectors in a file of this folder; None keeps them in memory.
    """

    def __init__(
        self, banks: int, dim: int, dtype: torch.dtype, device: torch.device | str | None, folder: str | None = None
    ) -> None:
        self.banks, self.dim, self.dtype = banks, dim, dtype
        self.folder = folder
        self.fixed = False
        # How far each store that reads this segment has filled or uses each bank.
        self.claims: WeakKeyDictionary[object, list[int]] = WeakKeyDictionary()
        self.books: dict[int, CodeBook] = {}
        self._file: BinaryIO | None = None
        scales = torch.zeros(banks, 0, dtype=torch.float16, device=device) if dtype == torch.int8 else None
        # One attribute, replaced as one: a reader in another thread never meets new vectors with old scales.
        self._held = torch.zeros(banks, 0, dim, dtype=dtype, device=device), scales

    @classmethod
    def adopt(cls, data: Tensor, scales: Tensor | None = None) -> Segment:
        """A segment of existing vectors (banks, n, dim), not copied and never written: nothing can be added to it."""
        segment = cls(data.shape[0], data.shape[2], data.dtype, data.device)
        segment._held, segment.fixed = (data, scales), True
        return segment

    @property
    def data(self) -> Tensor:
        """(banks, capacity, dim)."""
        return self._held[0]

    @property
    def scales(self) -> Tensor | None:
        """(banks, capacity) float16 of int8 vectors."""
        return self._held[1]

    @property
    def capacity(self) -> int:
        """Rows that fit without growing."""
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and scales, spare room included."""
        data, scales = self._held
        return data.numel() * data.element_size() + (0 if scales is None else scales.numel() * 2)

    def reserve(self, need: int, used: int) -> None:
        """Makes room for ``need`` rows a bank; the first ``used`` hold something.

        Raises:
            SettingError: The disk of ``folder`` is full.
        """
        if need <= self.capacity:
            return
        capacity = max(self.capacity, _FIRST_CAPACITY)
        while capacity < need:
            capacity = capacity * 2 if capacity < _DOUBLING_ENDS else capacity + capacity // 2
        data, scales = self._held
        if self.folder is not None:
            fresh = self._map(self.folder, capacity)
        else:
            # Zeros, not empty: padding of shorter banks stays finite in matrix products.
            fresh = torch.zeros(self.banks, capacity, self.dim, dtype=self.dtype, device=data.device)
            fresh[:, :used] = data[:, :used]
        if scales is not None:
            grown = torch.zeros(self.banks, capacity, dtype=torch.float16, device=scales.device)
            grown[:, :used] = scales[:, :used]
            scales = grown
        self._held = fresh, scales

    def _map(self, folder: str, capacity: int) -> Tensor:
        size = capacity * self.banks * self.dim * self.data.element_size()
        try:
            if self._file is None:
                os.makedirs(folder, exist_ok=True)
                # Open for as long as the segment lives: a file without a name cannot be opened again to grow.
                self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, prefix="lightning-fot-"))  # noqa: SIM115
                finalize(self, self._file.close)
            if hasattr(os, "posix_fallocate"):
                # A file with holes would end the process when the disk is full; reserved blocks raise here instead.
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
            mapped = mmap.mmap(self._file.fileno(), size)
        except OSError as error:
            raise SettingError(
                "model.memory.offload_dir", folder, f"cannot hold {size} bytes ({error.strerror})",
                "Make room there, or name another folder.",
            ) from error  # fmt: skip
        flat = torch.frombuffer(mapped, dtype=self.dtype)
        return flat.view(capacity, self.banks, self.dim).transpose(0, 1)

    def write(self, bank: int | None, start: int, data: Tensor, scales: Tensor | None) -> None:
        """Writes rows from ``start`` on: (n, dim) of one bank, or (banks, n, dim) of all where ``bank`` is None."""
        place = slice(start, start + data.shape[-2])
        where = slice(None) if bank is None else bank
        for number, book in self.books.items():
            if bank is None or bank == number:
                book.cut(start)
        own, own_scales = self._held
        own[where, place] = data
        if own_scales is not None and scales is not None:
            own_scales[where, place] = scales

    def rows(self, bank: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows of a bank as stored, views: (n, dim) and, for int8, scales (n,)."""
        data, scales = self._held
        return data[bank, start:stop], None if scales is None else scales[bank, start:stop]

    def book(self, bank: int) -> CodeBook:
        """Where eight-bit codes of a bank are kept, for all stores that read this segment."""
        return self.books.setdefault(bank, CodeBook())

    def pick(self, banks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Single rows as stored: (n, dim) and, for int8, scales (n,), of banks (n,) and rows (n,)."""
        data, scales = self._held
        if self._file is None:
            flat = data.flatten(0, 1).index_select(0, banks * data.shape[1] + rows)
        else:
            flat = data.transpose(0, 1).flatten(0, 1).index_select(0, rows * self.banks + banks)
        if scales is None:
            return flat, None
        return flat, scales.flatten().index_select(0, banks * scales.shape[1] + rows)
