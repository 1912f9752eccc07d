"""What was read: pairs of every memory layer, the text they came from, their files, what attention took of them.

Names load when used.
"""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.memory.memory import PACKED_SHARE as PACKED_SHARE
    from lightning_fot.memory.memory import Memory as Memory
    from lightning_fot.memory.memory import Pairs as Pairs
    from lightning_fot.memory.place import MemoryShape as MemoryShape

_HOME = {
    "Memory": "memory",
    "MemoryShape": "place",
    "PACKED_SHARE": "memory",
    "Pairs": "memory",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
