"""Settings of a memory that is shared out over processes, here or on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from lightning_fot.errors import SettingError, check_at_least, close_match

SETTING = "model.memory.shards"


@dataclass(frozen=True)
class ShardSettings:
    """Processes that share out the pairs of a memory (``model.memory.shards``, the number alone or a mapping).

    Args:
        count: Processes; each holds a slice of the pairs of all memory layers.
        address: Of a Ray cluster, such as ``10.0.0.1:6379``, or ``auto`` for the one of this machine; None joins the
            cluster that this process is part of, and starts one on this machine where there is none.
        cpus: Cores that a shard reserves; it computes with so many threads, and at least one.
        memory_mib: MiB of memory that a shard reserves, and may fill with pairs; None sets no limit.
        name: Under which the shards are listed in the cluster; two jobs cannot have one name. None leaves it to Ray.

    Raises:
        SettingError: A value is out of its range.

    Example:
        >>> ShardSettings.read({"count": 4, "memory_mib": 2048}).count
        4
    """

    count: int
    address: str | None = None
    cpus: float = 1.0
    memory_mib: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_at_least(SETTING, self, 1, "count", "memory_mib")
        if self.count is None:
            raise SettingError(f"{SETTING}.count", None, "must be a whole number of at least 1", "Correct it.")
        if isinstance(self.cpus, bool) or not isinstance(self.cpus, int | float) or not 0 <= self.cpus < 4096:
            raise SettingError(f"{SETTING}.cpus", self.cpus, "must be a number from 0", "1 is usual.")
        for name in ("address", "name"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise SettingError(f"{SETTING}.{name}", value, "is no text", "Leave it out, or give a word.")

    @classmethod
    def read(cls, given: int | Mapping[str, Any] | None) -> Self | None:
        """As it stands in ``model.memory.shards``; None where the memory is not shared out.

        Raises:
            SettingError: It is neither a number nor a mapping of these settings.
        """
        if given is None:
            return None
        if not isinstance(given, Mapping):
            return cls(given)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise SettingError(
                    f"{SETTING}.{name}", given[name], "is not known",
                    f"{close_match(str(name), known)}There are: {', '.join(known)}.",
                )  # fmt: skip
        if "count" not in given:
            raise SettingError(SETTING, dict(given), "does not say how many", "Add count: 2, for example.")
        return cls(**given)
