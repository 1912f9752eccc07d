from __future__ import annotations

import pytest

from lightning_fot.callbacks.budget import Budget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def measure(budget: Budget, clock: Clock, seconds: float) -> None:
    with budget.measuring():
        clock.now += seconds


def test_the_first_is_on_credit_and_each_later_one_is_paid_for() -> None:
    clock = Clock()
    budget = Budget(0.02, clock)
    assert budget.allowed
    measure(budget, clock, 4)
    clock.now += 399
    # Two measurements of 4 s: 8 s are 2 % of 400 s of training.
    assert not budget.allowed
    clock.now += 1.001
    assert budget.allowed
    measure(budget, clock, 4)
    assert not budget.allowed
    assert budget.spent == pytest.approx(8)


def test_the_share_holds_whatever_a_measurement_takes() -> None:
    clock = Clock()
    budget = Budget(0.02, clock)
    trained = 0.0
    for step in range(20_000):
        clock.now += 0.5
        trained += 0.5
        if budget.allowed:
            measure(budget, clock, 3 + step % 3)
    # What a measurement takes is known afterwards: at most the longest (5 s) minus the shortest (3 s) too much.
    assert 0.9 * 0.02 * trained < budget.spent <= 0.02 * trained + 2


def test_starting_anew_and_no_share() -> None:
    clock = Clock()
    budget = Budget(0.02, clock)
    measure(budget, clock, 4)
    budget.start()
    assert budget.allowed
    assert budget.spent == 0
    always = Budget(None, clock)
    measure(always, clock, 4)
    assert always.allowed


def test_a_measurement_that_fails_is_paid_for() -> None:
    clock = Clock()
    budget = Budget(0.5, clock)

    def fail() -> None:
        with budget.measuring():
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert budget.spent == 1
