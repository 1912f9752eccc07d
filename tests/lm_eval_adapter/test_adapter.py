"""The harness with our model: short requests as its own model answers them, long ones beside a memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lightning_fot.cli import main
from lightning_fot.lm_eval_adapter import MemoryHarness
from lightning_fot.pretrained import load_backbone, load_tokenizer
from tests.support.markdown_blocks import ROOT, blocks

# The harness leaves files to be closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

WINDOW = 64  # of the shipped configuration smoke
SHORT = [(context, more) for context in ("Hello there", "What is it", "x" * 30) for more in (" a", " b", " c d")]
LONG = [("some text of " + "abc" * 40 + ending, more) for ending in ("", "d") for more in (" one", " two", " 3 4")]


@pytest.fixture(scope="module")
def harness() -> MemoryHarness:
    return MemoryHarness(config="smoke", batch_size=3)


@pytest.fixture(scope="module")
def plain() -> HFLM:
    """The harness's own model on the same backbone."""
    name = "tiny-random-llama"
    return HFLM(load_backbone(name), tokenizer=load_tokenizer(name), batch_size=3, backend="causal")


def _asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=index) for index, each in enumerate(arguments)]


def test_short_requests_are_answered_bit_for_bit_as_by_the_plain_backbone(harness, plain):
    for kind, arguments in (
        ("loglikelihood", SHORT),
        ("loglikelihood", [("", " a")]),
        ("loglikelihood_rolling", [("some text",), ("x" * (WINDOW - 2),)]),
        ("generate_until", [(context, {"until": ["q"], "max_gen_toks": 12}) for context, _ in SHORT]),
    ):
        requests = _asked(kind, *arguments)
        assert getattr(harness, kind)(requests) == getattr(plain, kind)(requests), kind


def test_long_requests_go_through_the_memory_in_the_order_asked(harness, plain):
    mixed = [LONG[0], SHORT[0], *LONG[1:], SHORT[1]]
    found = harness.loglikelihood(_asked("loglikelihood", *mixed))
    alone = [harness.loglikelihood(_asked("loglikelihood", pair))[0] for pair in mixed]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-3)
    whole = plain.loglikelihood(_asked("loglikelihood", *mixed))
    assert [abs(one[0] - other[0]) > 0.01 for one, other in zip(found, whole, strict=True)] == [
        pair in LONG for pair in mixed
    ]


@pytest.mark.slow
def test_what_is_generated_is_greedy(harness):
    context = LONG[0][0]
    (text,) = harness.generate_until(_asked("generate_until", (context, {"until": [], "max_gen_toks": 30})))
    ids = harness.tok_encode(context)
    generated = harness.lm.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()
    assert text == harness.tok_decode(generated)
    ((_, greedy),) = harness._loglikelihood_tokens([(None, ids, generated)])
    assert greedy
    # Two rows of unequal length get what each gets alone.
    other = "y" + context
    both = [(prompt, {"until": [], "max_gen_toks": 10}) for prompt in (context, other)]
    together = harness.generate_until(_asked("generate_until", *both))
    assert together == [harness.generate_until(_asked("generate_until", one))[0] for one in both]


def test_a_long_text_is_scored_whole(harness):
    text = "Ada, " + "abc " * 60
    (found,) = harness.loglikelihood_rolling(_asked("loglikelihood_rolling", (text,)))
    ids = harness.tok_encode(text)
    # What the chain rule says, part after part.
    parts = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    assert len(parts) > 4
    read, total = [harness.prefix_token_id], 0.0
    for part in parts:
        total += harness._loglikelihood_tokens([(None, read, part)])[0][0]
        read = read + part
    assert found == pytest.approx(total, abs=1e-2)


def test_prompts_are_cut_only_where_that_is_asked_for():
    context, more = LONG[0]
    cut = MemoryHarness(config="smoke", max_length=100)
    whole = MemoryHarness(config="smoke")
    ids, end = cut._encode_pair(context, more)
    assert len(ids) + len(end) > 101
    expected = whole._loglikelihood_tokens([(None, ids[-(101 - len(end)) :], end)])
    assert cut._loglikelihood_tokens([(None, ids, end)]) == expected
    assert whole._loglikelihood_tokens([(None, ids, end)]) != expected


def _task(folder: Path) -> str:
    """A multiple choice over a file, and its name."""
    rows = [{"text": f"{'word ' * 30}The key is {key}. The key is", "choices": [" 7", " 8"], "gold": key - 7}
            for key in (7, 8, 7)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "keys.yaml").write_text(
        f"task: fot_keys\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    return "fot_keys"


@pytest.mark.slow
def test_a_task_of_ones_own_over_a_local_file(tmp_path, harness):
    name = _task(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(harness, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert found["results"][name]["sample_len"] == 3
    # By hand: the choice of the higher score is taken.
    for sample in found["samples"][name]:
        (first, _), (second, _) = (tuple(map(float, answer[0])) for answer in sample["resps"])
        assert sample["acc"] == float((second > first) == sample["target"])


@pytest.mark.slow
def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    name = _task(tmp_path / "tasks")
    (block,) = blocks((ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(block.replace('"mine"', f'"{name}"'), "docs/lm_eval.md", "exec"), scope)
    assert scope["results"]["results"][name]["sample_len"] == 3


@pytest.mark.slow
def test_the_command_runs_a_task_and_writes_what_was_measured(tmp_path, capfd):
    name = _task(tmp_path)
    words = ["--tasks", name, f"--include_path={tmp_path}", f"--output_path={tmp_path / 'out'}"]
    assert main(["lm-eval", "--config", "smoke", "--model.memory.top_k=8", *words]) == 0
    assert name in capfd.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model.memory.top_k"] == 8
    given = {"pretrained": "tiny-random-llama", "config": "smoke", "model.memory.top_k": "8"}
    assert results["config"]["model_args"] == given
    assert results["model_name"] == "tiny-random-llama"


@pytest.mark.slow
def test_a_task_of_ruler_that_needs_no_network(tmp_path, capfd):
    pytest.importorskip("wonderwords")
    words = ["--tasks", "niah_single_1", "--limit", "1", "--gen_kwargs", "max_gen_toks=4", f"--output_path={tmp_path}"]
    assert main(["lm-eval", "--config", "smoke", *words]) == 0
    (file,) = tmp_path.rglob("results_*.json")
    assert "4096,none" in json.loads(file.read_text())["results"]["niah_single_1"]
