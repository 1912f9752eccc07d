from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from lightning_fot.config import EvaluationConfig
from lightning_fot.config.retriever import MIN_INDEX_SIZE, retriever_label
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.plan import fit_to_documents, phases, plan, select_documents


@dataclass
class Document:
    name: str
    ids: np.ndarray


def document(tokens: int) -> Document:
    return Document(f"{tokens} tokens", np.zeros(tokens, dtype=np.int32))


@pytest.mark.parametrize(
    ("spec", "label"),
    [("hnsw", "hnsw"), ({"name": "hnsw", "M": 4}, "hnsw"), ("package.module.Mine", "Mine"), (Document, "Document")],
)
def test_labels(spec: object, label: str) -> None:
    assert retriever_label(spec) == label


def test_planning_loads_no_torch() -> None:
    code = "import sys, lightning_fot.evaluation.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_measurement_has_one_phase() -> None:
    config = EvaluationConfig(context_tokens=[4096, 1024, 1024], passkey_tokens=[1024])
    names = [name for name, _ in plan(config, "hnsw")]
    assert len(names) == len(set(names)) == 1 + 2 * 2 + 2 + 3
    assert len(plan(config, "exact")) == 1 + 2 + 1 + 2
    assert all(cost >= 0 for _, cost in plan(config, "hnsw"))


def test_nothing_asked_nothing_planned() -> None:
    assert plan(EvaluationConfig(context_tokens=[], passkey_tokens=[])) == []
    assert plan(EvaluationConfig(context_tokens=[], passkey_samples=0)) == []


def test_what_an_index_cannot_serve_is_not_computed_twice() -> None:
    config = EvaluationConfig(context_tokens=[1024, 4096], passkey_tokens=[1024])
    free = [phase.name for phase in phases(config, {"name": "hnsw", "min_index_size": 2048}, 512) if not phase.cost]
    assert free == ["perplexity: exact, 1024 tokens", "passkey: exact"]


def test_exact_search_is_left_out_beyond_its_limit() -> None:
    settings = {"context_tokens": [1024, 4096], "passkey_tokens": [1024, 4096], "needles": {"tokens": [1024, 4096]}}
    limited = phases(EvaluationConfig(**settings, exact_tokens=1024), "hnsw", 512)
    whole = phases(EvaluationConfig(**settings), "hnsw", 512)
    missing = {phase.name for phase in whole} - {phase.name for phase in limited}
    assert missing == {"perplexity: exact, 4096 tokens", "needles: exact, 4096 tokens"}
    costs = [{phase.name: phase.cost for phase in listed} for listed in (limited, whole)]
    assert costs[0]["passkey: hnsw"] == costs[1]["passkey: hnsw"]
    never = phases(EvaluationConfig(**settings, distractor_tokens=[1024], exact_tokens=0), "hnsw", 512)
    assert [phase.section for phase in never if phase.memory == "exact"] == ["retrieval"]
    # Where exact search is what is measured, it is.
    assert phases(EvaluationConfig(**settings, exact_tokens=0), "exact", 512) == phases(
        EvaluationConfig(**settings), "exact", 512
    )
    with pytest.raises(SettingError, match=r"evaluation\.exact_tokens"):
        EvaluationConfig(exact_tokens=-1)


def test_the_default_plan_fits_four_minutes() -> None:
    # Two slow cores pass about 290 tokens a second.
    assert sum(cost for _, cost in plan(EvaluationConfig(), {"name": "hnsw", "min_index_size": 1})) / 290 < 260


def test_the_size_of_an_index_is_the_retrievers() -> None:
    from lightning_fot.retrievers.base import Retriever

    assert inspect.signature(Retriever.__init__).parameters["min_index_size"].default == MIN_INDEX_SIZE


def test_documents_that_are_long_enough_are_taken_in_order() -> None:
    config = EvaluationConfig(context_tokens=[100], target_tokens=50, documents=2)
    chosen = select_documents([document(tokens) for tokens in (150, 151, 10, 400, 500)], config)
    assert [len(chosen_one.ids) for chosen_one in chosen] == [151, 400]
    assert select_documents([], EvaluationConfig(context_tokens=[])) == []


@pytest.mark.parametrize("tokens", [[], [120], [20]])
def test_documents_that_are_too_short_are_an_error_that_says_what_would_work(tokens: list[int]) -> None:
    config = EvaluationConfig(context_tokens=[100], target_tokens=50)
    with pytest.raises(SettingError, match=r"evaluation\.context_tokens.*151 tokens.*data\.paths"):
        select_documents([document(count) for count in tokens], config)


@pytest.mark.parametrize(
    ("lengths", "contexts", "target"),
    [
        ([9000, 8000], [1024, 2048], 512),  # everything fits
        ([2000, 1900, 50], [1024, 1280], 512),  # both documents serve: 1900 tokens leave room for five windows
        ([2000, 700], [1024, 1280], 512),  # the second is too short to care for
        ([900], [512], 256),  # not even the shortest context: a third is scored
    ],
)
def test_contexts_are_fitted_to_the_documents(lengths: list[int], contexts: list[int], target: int) -> None:
    config = EvaluationConfig(context_tokens=[1024, 2048], target_tokens=512, documents=2)
    documents = [document(length) for length in lengths]
    fitted = fit_to_documents(documents, config, window=256)
    assert (fitted.context_tokens, fitted.target_tokens) == (contexts, target)
    assert select_documents(documents, fitted)


def test_documents_shorter_than_two_windows_are_refused_still() -> None:
    config = EvaluationConfig(context_tokens=[1024], target_tokens=512)
    documents = [document(400)]
    assert fit_to_documents(documents, config, window=256) is config
    with pytest.raises(SettingError, match="the longest of 1 has 400"):
        select_documents(documents, config)
