"""Counters of a retriever, cheap enough to be kept on every call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RetrieverStats:
    """What a retriever did since it was made, forked or reset as a whole.

    Attributes:
        adds: Calls of ``add``.
        searches: Calls of ``search``.
        queries: Queries answered, summed over banks.
        add_seconds: Time in ``add``.
        search_seconds: Time in ``search``, waiting for index building excluded.
        build_seconds: Time spent building and extending indexes, whoever waited or not.
        wait_seconds: Time that callers waited for that, in ``search`` or ``flush``.
        build_times: Seconds of each of the newest 256 builds and extensions, in the order they were taken into use.
        rows_scanned: Keys scored exactly, summed over queries: a full scan of n keys counts n for each query.
        fallbacks: Bank searches or builds that the backend failed and exact search answered.
        rebuilds: Indexes built from scratch.
    """

    adds: int = 0
    searches: int = 0
    queries: int = 0
    add_seconds: float = 0.0
    search_seconds: float = 0.0
    build_seconds: float = 0.0
    wait_seconds: float = 0.0
    build_times: tuple[float, ...] = ()
    rows_scanned: int = 0
    fallbacks: int = 0
    rebuilds: int = 0

    def built(self, seconds: float, anew: bool) -> None:
        """Counts a build, or an extension."""
        self.build_seconds += seconds
        self.build_times = (*self.build_times[-255:], seconds)
        self.rebuilds += anew
