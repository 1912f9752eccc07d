"""Preallocated, append-only key buffers that snapshots share copy-on-write."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.retrievers.settings import check_value

_FIRST_CAPACITY = 256


class _Buffer:
    """Memory that several stores may read; ``written`` is how far any of them has filled each bank."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.written = [0] * keys.shape[0]
        self.owners: WeakSet[KeyStore] = WeakSet()


class KeyStore:
    """Keys of several banks in one growing buffer (banks, capacity, dim); capacity doubles.

    Rows are written once and never change, so a fork shares the buffer: either side goes on appending in place for as
    long as nobody else has written beyond its own end, and copies first otherwise.

    Args:
        dim: Head size D.
        banks: Independent key sets, one for each (sequence, KV head).
        dtype: Stored floating dtype.
        device: Where the buffer lies.

    Raises:
        SettingError: ``dim`` or ``banks`` is below 1, or ``dtype`` is not floating.

    Example:
        >>> store = KeyStore(dim=2)
        >>> store.append(torch.ones(1, 3, 2))
        >>> snapshot = store.fork()
        >>> store.append(torch.zeros(1, 1, 2))
        >>> store.lengths.tolist(), snapshot.lengths.tolist()
        ([4], [3])
    """

    def __init__(
        self,
        dim: int,
        banks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_value("dim", dim, "dim")
        check_value("banks", banks, "banks")
        if not dtype.is_floating_point:
            raise SettingError("dtype", dtype, "is not a floating dtype", "Use float32 or bfloat16.")
        self.dim = dim
        self.banks = banks
        self._lengths = [0] * banks
        self._adopt(_Buffer(torch.zeros(banks, 0, dim, dtype=dtype, device=device)))

    def _adopt(self, buffer: _Buffer) -> None:
        self._buffer = buffer
        buffer.owners.add(self)

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype."""
        return self._buffer.keys.dtype

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self._buffer.keys.device

    @property
    def capacity(self) -> int:
        """Keys a bank that fit without growing."""
        return self._buffer.keys.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Keys of each bank, (banks,) int64, on the CPU."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @property
    def lengths_list(self) -> list[int]:
        """Keys of each bank as Python integers (a copy)."""
        return list(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, spare capacity included; shared buffers count in full."""
        return self._buffer.keys.numel() * self._buffer.keys.element_size()

    def view(self) -> Tensor:
        """All keys (banks, max_len, dim), a view; in shorter banks what lies past their length is arbitrary."""
        return self._buffer.keys[:, : max(self._lengths)]

    def bank(self, bank: int) -> Tensor:
        """Keys of one bank (n, dim), a view."""
        return self._buffer.keys[bank, : self._lengths[bank]]

    def append(self, keys: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Write keys behind those that each bank has.

        Args:
            keys: (banks, n, dim), any floating dtype and layout.
            lengths: (banks,): bank b takes its first ``lengths[b]`` keys; None takes all n.

        Raises:
            SettingError: Shapes do not fit or a length is not in 0..n.
        """
        counts = self.checked_counts(keys, lengths)
        longest = max(counts)
        if longest == 0:
            return
        ends = [old + count for old, count in zip(self._lengths, counts, strict=True)]
        self._make_writable(max(ends))
        buffer = self._buffer
        source = keys.detach().to(device=buffer.keys.device, dtype=buffer.keys.dtype)
        if len(set(self._lengths)) == 1 and len(set(counts)) == 1:
            buffer.keys[:, self._lengths[0] : ends[0]] = source[:, :longest]
        else:
            for bank, (start, end) in enumerate(zip(self._lengths, ends, strict=True)):
                buffer.keys[bank, start:end] = source[bank, : end - start]
        self._lengths = ends
        buffer.written = list(ends)

    def checked_counts(self, keys: Tensor, lengths: Tensor | Sequence[int] | None) -> list[int]:
        """Keys that each bank takes from ``append(keys, lengths)``.

        Raises:
            SettingError: Shapes do not fit or a length is not in 0..n.
        """
        if keys.dim() != 3 or keys.shape[0] != self.banks or keys.shape[2] != self.dim:
            raise SettingError(
                "keys", tuple(keys.shape), f"is not (banks={self.banks}, n, dim={self.dim})", "Pass one row a bank."
            )
        if not keys.is_floating_point():
            raise SettingError("keys", keys.dtype, "is not a floating dtype", "Convert the keys.")
        n = keys.shape[1]
        if lengths is None:
            return [n] * self.banks
        counts = [int(value) for value in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(counts) != self.banks or any(not 0 <= count <= n for count in counts):
            raise SettingError("lengths", counts, f"is not {self.banks} numbers from 0 to {n}", "One a bank.")
        return counts

    def _make_writable(self, need: int) -> None:
        """Own the rows past this store's end and have room for ``need`` rows a bank."""
        buffer = self._buffer
        # A row that another owner wrote past our end must not be overwritten.
        clash = buffer.written != self._lengths and len(buffer.owners) > 1
        if need <= self.capacity and not clash:
            return
        capacity = max(self.capacity, _FIRST_CAPACITY)
        while capacity < need:
            capacity *= 2
        used = max(self._lengths)
        # Zeros, not empty: padding of shorter banks stays finite in matrix products.
        fresh = torch.zeros(self.banks, capacity, self.dim, dtype=self.dtype, device=self.device)
        fresh[:, :used] = buffer.keys[:, :used]
        buffer.owners.discard(self)
        self._adopt(_Buffer(fresh))

    def fork(self) -> KeyStore:
        """A snapshot in O(1): same keys, own length; what either side appends later is not seen by the other."""
        twin = KeyStore.__new__(KeyStore)
        twin.dim, twin.banks = self.dim, self.banks
        twin._lengths = list(self._lengths)
        twin._adopt(self._buffer)
        return twin

    def reset(self, banks: Sequence[int] | None = None) -> None:
        """Forget the keys of some banks, or of all.

        Args:
            banks: Bank numbers; None means all.

        Raises:
            SettingError: A bank number is out of range.
        """
        for bank in checked_banks(banks, self.banks):
            self._lengths[bank] = 0

    def __getstate__(self) -> dict[str, object]:
        used = max(self._lengths)
        return {"lengths": list(self._lengths), "keys": self._buffer.keys[:, :used].clone()}

    def __setstate__(self, state: dict[str, object]) -> None:
        keys, lengths = state["keys"], state["lengths"]
        assert isinstance(keys, Tensor)
        assert isinstance(lengths, list)
        self.banks, _, self.dim = keys.shape
        self._lengths = lengths
        self._adopt(_Buffer(keys))
        self._buffer.written = list(lengths)


def checked_banks(banks: Sequence[int] | None, total: int) -> list[int]:
    """Bank numbers as a list; None means all.

    Raises:
        SettingError: A number is not in 0..total-1.
    """
    if banks is None:
        return list(range(total))
    numbers = [int(bank) for bank in banks]
    if any(not 0 <= bank < total for bank in numbers):
        raise SettingError("banks", numbers, f"names a bank outside 0 to {total - 1}", "Correct it.")
    return numbers
