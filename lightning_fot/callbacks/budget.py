"""How much of a training run's time measuring may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L


class Budget:
    """Allows a measurement once the time since the start has paid for it.

    The first is allowed on credit, so that short runs have one figure; it is paid for like the others before the next.

    Args:
        share: Of the time that is not spent measuring; None allows all.
        clock: Seconds.
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.spent = 0.0
        """Seconds measured since the start."""
        self._clock = clock
        self._last = 0.0
        self._began = clock()

    def start(self) -> None:
        """Begins anew."""
        self.spent, self._last, self._began = 0.0, 0.0, self._clock()

    @property
    def allowed(self) -> bool:
        """Whether one more measurement, as long as the last, stays within the share."""
        if self.share is None or not self._last:
            return True
        return self.spent + self._last <= self.share * (self._clock() - self._began - self.spent)

    def allows(self, trainer: L.Trainer) -> bool:
        """Whether a measurement is paid for; outside ``fit`` it always is. Ranks agree, since reading may need all of
        them (sharded weights).
        """
        if trainer.state.fn != "fit":
            return True
        allowed: bool = trainer.strategy.broadcast(self.allowed)
        return allowed

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What runs inside the block is paid for."""
        began = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - began
            self.spent += self._last
