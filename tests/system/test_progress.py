from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_fot.system.progress import JobProgress, format_seconds


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _progress(clock: _Clock, terminal: bool = False) -> tuple[JobProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    return JobProgress(console, every_s=5.0, clock=clock, first_speed=100.0), out


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (185, "3m05s"), (3725, "1h02m"), (-1, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_estimate_uses_the_speed_seen() -> None:
    clock = _Clock()
    progress, _ = _progress(clock)
    progress.plan([("a", 100.0), ("b", 300.0)])
    assert progress.remaining() == pytest.approx(4.0)  # 400 units at the assumed 100 a second
    progress.start("a")
    clock.now += 10
    progress.advance(50)
    # Half of a in 10 s: 10 s for its rest, 60 s for b.
    assert progress.remaining() == pytest.approx(70.0)
    clock.now += 10
    progress.finish("a")
    assert progress.remaining() == pytest.approx(60.0)
    progress.start("b")
    clock.now += 1
    progress.advance(100)
    # b is faster than a was: 200 left at 100 a second.
    assert progress.remaining() == pytest.approx(2.0)


def test_replanning_keeps_what_is_done() -> None:
    clock = _Clock()
    progress, _ = _progress(clock)
    progress.plan([("a", 100.0), ("b", 100.0), ("c", 100.0)])
    progress.start("a")
    clock.now += 1
    progress.finish("a")
    progress.plan([("a", 5.0), ("b", 0.0)])
    assert progress.remaining() == pytest.approx(1.0)  # only c


def test_nothing_is_said_of_what_is_left_before_anything_is_known() -> None:
    clock, out = _Clock(), io.StringIO()
    progress = JobProgress(Console(file=out, width=120), clock=clock, first_speed=None)
    progress.plan([("layer 18", 1.0), ("layer 20", 1.0)])
    progress.start("layer 18")
    clock.now += 60
    progress.advance(0.0, "hnsw")
    assert progress.remaining() is None
    assert "left" not in out.getvalue()
    progress.finish("layer 18")
    assert progress.remaining() == pytest.approx(60.0)
    assert "1m00s gone, about 1m00s left" in out.getvalue()


def test_plain_lines_come_at_intervals() -> None:
    clock = _Clock()
    progress, out = _progress(clock)
    with progress:
        progress.plan([("train", 100.0)])
        progress.start("train")
        for step in range(10):
            clock.now += 1
            progress.advance(10, f"step {step + 1}/10")
        progress.finish("train")
        progress.message("saved [here]")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("[  0%] train;")
    assert "step 5/10; 5s gone, about 5s left" in lines[1]
    assert "done in 10s" in lines[-2]
    assert lines[-1] == "saved [here]"
    assert len(lines) == 5


def test_more_work_than_planned_never_goes_beyond_all() -> None:
    clock = _Clock()
    progress, out = _progress(clock)
    progress.plan([("a", 10.0)])
    progress.start("a")
    clock.now += 10
    progress.advance(50)
    assert progress.remaining() == 0
    assert "[100%]" in out.getvalue()


def test_live_bar_on_a_terminal() -> None:
    clock = _Clock()
    progress, out = _progress(clock, terminal=True)
    with progress:
        progress.plan([("train", 100.0)])
        progress.start("train")
        clock.now += 1
        progress.advance(50, "step 1/2")
        progress.finish("train")
    assert "train" in out.getvalue()
    progress.message("after")
    assert "after" in out.getvalue()


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    clock = _Clock()
    progress, out = _progress(clock, terminal=True)
    with progress:
        progress.plan([("reading", 100.0)])
        progress.start("reading")
        clock.now += 1
        progress.advance(50, "a [red]x[/blue].txt")
    assert "[red]x[/blue]" in out.getvalue()
