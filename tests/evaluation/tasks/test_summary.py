"""Standard errors of tasks: what belongs to one text is one draw."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_fot.evaluation.tasks.summary import summarised, task_row


def _episode(nats: list[float]) -> dict:
    return {"right": [1] * len(nats), "tokens": [2] * len(nats), "nats": nats, "ask_s": 0.1}


@pytest.mark.parametrize("copies", [1, 5])
def test_answers_about_one_text_are_one_draw(copies: int) -> None:
    losses = [1.0, 3.0, 8.0]
    row = task_row("needles", 64, "exact", [_episode([nats] * copies) for nats in losses])
    assert row["nll"] == pytest.approx(2.0)
    assert row["nll_standard_error"] == pytest.approx(np.std([0.5, 1.5, 4.0], ddof=1) / 3**0.5)


def test_of_one_text_alone_answers_are_the_draws() -> None:
    row = task_row("key_value", 64, "exact", [_episode([1.0, 3.0, 8.0])])
    assert row["nll_standard_error"] == pytest.approx(np.std([0.5, 1.5, 4.0], ddof=1) / 3**0.5)


@pytest.mark.parametrize("copies", [1, 4])
def test_names_of_one_story_are_one_draw(copies: int) -> None:
    def story(nats: float) -> dict:
        return {"windows": [[10.0, 5]], "names": [[nats, 1]] * copies, "index_used": None}

    record, plain = [story(1.0), story(4.0)], [story(2.0), story(9.0)]
    _, rows = summarised("story", 64, "exact", record, plain)
    (row,) = [row for row, _ in rows if "names" in row]
    assert (row["names"], row["nll"], row["gain_nats"]) == (2 * copies, pytest.approx(2.5), pytest.approx(3.0))
    assert row["nll_standard_error"] == pytest.approx(1.5)
    assert row["gain_standard_error"] == pytest.approx(2.0)
