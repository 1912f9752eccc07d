"""What the harness adapter computes without the harness: scores, and which requests go where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.cli import main
from lightning_fot.commands.lm_eval import VERB, described
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.scoring import Score, answer_apart, new_tokens, plain_tokens, score_continuations
from lightning_fot.request.harness import model_settings
from lightning_fot.request.words import read
from tests.support.models import WINDOW, settings, tiny_llama, tokens

SETTINGS = [
    {},
    {"top_k": 3, "skip_window_start": 1},
    {"last_context_length": 6},
    {"overlap": 5, "sink_tokens": 2},
    {"positions": "none"},
    {"attending": "gate"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [1, WINDOW + 1, pytest.param(60, marks=pytest.mark.slow)])
def test_what_generate_writes_is_greedy_and_as_likely_as_it_says(changes, length):
    with attach_memory(tiny_llama(), settings(**changes)) as lm:
        ids = tokens(1, length)
        # Longer than a window: the memory is written to while the continuation is read.
        out = lm.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True)
        written = out.sequences[0, length:].tolist()
        steps = [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, written, strict=True)]
        other = int(out.logits[0][0].argmin())
        found = score_continuations(lm, ids[0].tolist(), [written, written[:7], [other], [other, 1, 2]])
        (alone,) = score_continuations(lm, ids[0].tolist(), [[other, 1, 2]])
    assert [score.greedy for score in found] == [True, True, False, False]
    expected = [sum(steps), sum(steps[:7]), float(out.logits[0][0].log_softmax(-1)[other])]
    assert [score.logprob for score in found[:3]] == pytest.approx(expected, abs=2e-4)
    # A continuation is scored as it would be alone, whatever else goes on from its context.
    assert found[3].logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_within_the_window_it_is_the_plain_backbone():
    model = tiny_llama()
    ids = tokens(1, WINDOW)
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)
    with attach_memory(model, settings()) as lm:
        (found,) = score_continuations(lm, ids[0, :10].tolist(), [ids[0, 10:].tolist()])
    expected = plain[0, 9:-1].gather(1, ids[0, 10:, None]).sum()
    assert found.logprob == pytest.approx(float(expected), abs=1e-4)


def test_what_lies_beyond_the_window_counts():
    with attach_memory(tiny_llama(), settings()) as lm:
        first, second = tokens(1, 50), tokens(1, 50)
        second[0, 3] += 1
        one, two = (score_continuations(lm, ids[0].tolist(), [[5]])[0] for ids in (first, second))
    assert abs(one.logprob - two.logprob) > 1e-4


def test_nothing_to_score_is_named():
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match="has no token"):
        score_continuations(lm, [1], [[2], []])


def test_models_that_are_plain_up_to_a_window():
    assert plain_tokens(settings()) == WINDOW
    assert plain_tokens(settings(positions="none")) == plain_tokens(settings(attending="gate")) == 0


def test_answers_come_back_in_order():
    asked: list[list[int]] = []

    def answer(some: list[int]) -> list[Score]:
        asked.append(some)
        return [Score(float(number), True) for number in some]

    found = answer_apart([30, 1, 20, 2], lambda number: number < 10, answer, answer)
    assert [score.logprob for score in found] == [30, 1, 20, 2]
    assert asked == [[1, 2], [30, 20]]
    assert answer_apart([1], lambda number: True, answer, answer) == [Score(1.0, True)]


def test_the_length_of_an_answer_has_many_names():
    assert new_tokens({"max_tokens": 3, "max_gen_toks": 4}, 9) == 4
    assert new_tokens({"until": []}, 9) == 9


def test_the_command_line_is_parted():
    words = "--config=a.yaml --tasks x,y --model.memory.top_k 8 --limit 2 --ckpt_path last --model.dtype=bfloat16"
    given = read(words.split(), VERB)
    expected = {"config": "a.yaml", "model.memory.top_k": "8", "ckpt_path": "last", "model.dtype": "bfloat16"}
    assert described(given) == expected
    assert given.others == ["--tasks", "x,y", "--limit", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "smoke"], "tasks=None: are not given"),
        (["--tasks", "x", "--model", "hf"], "is always lightning-fot here"),
        (["--tasks", "x", "--config", "smoke", "--model.memory.topk=3"], "Did you mean model.memory.top_k"),
        (["--tasks", "x", "--config", "smoke", "--model.trainable=all"], "model.trainable='all': is not known"),
        (["--tasks", "x", "--config", "smoke", "--config"], "has no value"),
        (["--tasks", "x", "--config", "nowhere.yaml"], "no such file"),
        (["--tasks", "x", "--config", "smoke", "--batch_size", "auto"], "batch_size='auto': tries batches until"),
        (["--tasks", "x", "--config", "smoke", "--batch_size=auto:4"], "Give a number"),
        (["--tasks", "x", "--config", "smoke", "-b", "0"], "batch_size='0': must be a whole number of at least 1"),
    ],
)
def test_mistakes_are_told_before_the_harness_is_loaded(words, message, capsys):
    assert main(["lm-eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_those_of_a_command_line(tmp_path: Path):
    arguments = {"config": "smoke", "model.memory.top_k": 8, "model.memory.retriever": {"name": "hnsw", "M": 4}}
    found = model_settings(arguments)
    assert found.backbone == "tiny-random-llama"
    assert (found.memory["top_k"], found.memory["window"]) == (8, 64)
    assert found.memory["retriever"]["M"] == 4
    # As the harness keeps them: in JSON.
    assert model_settings(json.loads(json.dumps(arguments))) == found
    rope = tmp_path / "rope.yaml"
    rope.write_text("model: {backbone: tiny-random-llama, rope: {type: linear, factor: 2.0}}")
    with pytest.raises(SettingError, match=r"model\.rope"):
        model_settings({"config": str(rope)})
    with pytest.raises(SettingError, match=r"confg='smoke': is not known. Did you mean config"):
        model_settings({"confg": "smoke"})


def test_without_the_harness_its_installation_is_told(capsys):
    from importlib.util import find_spec

    if find_spec("lm_eval") is not None:
        pytest.skip("the harness is installed")
    assert main(["lm-eval", "--config", "smoke", "--tasks", "x"]) == 2
    assert re.search(r"lm-eval needs .*pip install 'lightning-fot\[lm-eval\]'", capsys.readouterr().err)
