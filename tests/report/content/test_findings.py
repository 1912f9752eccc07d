from __future__ import annotations

from typing import Any

import pytest

from lightning_fot.report.content import findings, formats, read


def of(results: dict[str, Any], topic: str) -> findings.Finding:
    return next(finding for finding in findings.find(results) if topic in finding.topic)


def last(results: dict[str, Any], part: str, memory: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [row for row in results[part] if row["memory"] == memory]
    return rows[-1]


def test_good_news_with_its_error(results: dict[str, Any]) -> None:
    finding = of(results, "Perplexity")
    assert finding.verdict == "good"
    assert "6.7% lower" in finding.text
    assert "Exact search gives 6.43: the index costs 0.3%" in finding.text
    assert "4,096 tokens scored in 2 documents" in finding.caveat
    assert "−6.7% ± 0.7" in finding.caveat


def test_bad_news_is_said_as_plainly(results: dict[str, Any]) -> None:
    last(results, "perplexity", "hnsw").update(value=7.4, gain_nats=-0.068)
    finding = of(results, "Perplexity")
    assert finding.verdict == "bad"
    assert "7.0% higher than without: the model predicts the text worse" in finding.text


def test_a_change_within_its_error_is_not_claimed(results: dict[str, Any]) -> None:
    last(results, "perplexity", "hnsw").update(value=6.90, gain_nats=0.002)
    finding = of(results, "Perplexity")
    assert finding.verdict == "open"
    assert "too close to zero" in finding.caveat


def test_without_paired_errors_the_larger_ones_count(results: dict[str, Any]) -> None:
    for row in results["perplexity"]:
        row.pop("gain_nats", None)
        row.pop("gain_standard_error", None)
    finding = of(results, "Perplexity")
    assert finding.verdict == "open"
    assert "does not settle it" in finding.caveat


def test_a_context_read_in_one_window_is_told_as_such(results: dict[str, Any]) -> None:
    rows = [row for row in results["perplexity"] if row["memory"] in ("none", "exact")]
    results["perplexity"] = [{**row, "memory": "full_context"} if row["memory"] == "exact" else row for row in rows]
    finding = of(results, "Perplexity")
    assert "tokens of context" in finding.topic
    assert "(full context), perplexity on held-out text is" in finding.text
    assert "memory" not in finding.topic + finding.text


def test_passkey_tells_how_few_prompts_there_were(results: dict[str, Any]) -> None:
    finding = of(results, "Passkey")
    assert finding.value == "2 of 6"
    assert "exact search: 3 of 6; no memory: 0 of 6" in finding.text
    assert "between 10% and 70%" in finding.caveat
    assert finding.verdict == "open"
    last(results, "tasks", "hnsw")["accuracy"] = 0.0
    assert of(results, "Passkey").verdict == "bad"
    assert "does not find" in of(results, "Passkey").text


def test_retrieval_uses_the_runs_own_setting(results: dict[str, Any]) -> None:
    finding = of(results, "Recall@32")
    assert "hnsw at ef_search=64 finds 95.1% of the 32 best keys" in finding.text
    assert "2.5× as fast as exact search in the same run" in finding.text
    assert "hold only 62.0% of all attention" in finding.caveat


def test_the_configured_mark_wins_over_the_settings(results: dict[str, Any]) -> None:
    results["config"]["model"]["memory"]["retriever"] = "hnsw"
    assert not read.configured_is_certain(results)
    assert "do not say which query setting" in of(results, "Recall@32").caveat
    for row in results["retrieval"]:
        row["configured"] = row["args"]["ef_search"] == 128
    assert read.configured_is_certain(results)
    assert "ef_search=128" in of(results, "Recall@32").text


@pytest.mark.parametrize("share", [0.97, 1.03])
def test_an_index_as_fast_as_exact_search_is_called_so(results: dict[str, Any], share: float) -> None:
    for row in results["retrieval"]:
        exact = next(other for other in results["exact"] if other["layer"] == row["layer"])
        row["search_ms_p50"], row["qps"] = exact["search_ms_p50"] / share, exact["qps"] * share
    assert of(results, "Recall@32").value == "95.1%, as fast as exact"


def test_a_slower_index_is_called_slower(results: dict[str, Any]) -> None:
    for row in results["exact"]:
        row["qps"] *= 10
    finding = of(results, "Recall@32")
    assert finding.verdict == "bad"
    assert "here the index does not pay" in finding.text
    assert finding.value == "95.1%, 4.0× slower"


def test_recall_of_an_unused_index_is_no_result(results: dict[str, Any]) -> None:
    for row in results["retrieval"]:
        row |= {"index_used": False, "recall": 1.0}
    finding = of(results, "Recall@32")
    assert finding.verdict == "open"
    assert "too small for the hnsw index" in finding.text


def test_no_training_is_said(results: dict[str, Any]) -> None:
    results["training"] = {"steps": 0}
    assert "not trained" in of(results, "Training").text
    results["training"] = {"steps": 5, "loss_first": 1.0, "loss_last": 1.2}
    assert of(results, "Training").verdict == "bad"


def test_class_paths_are_called_by_their_last_part() -> None:
    memory = {"retriever": {"class_path": "package.module.Mine", "init_args": {"ef": 3}}}
    results = {"config": {"model": {"memory": memory}}}
    assert read.retriever_name(results) == "Mine"
    assert read.retriever_arguments(results) == {"ef": 3}


def test_pareto_front() -> None:
    points = [(0.5, 10.0), (0.9, 5.0), (0.8, 4.0), (1.0, 1.0), (0.5, 9.0)]
    assert read.pareto_front(points) == {(0.5, 10.0), (0.9, 5.0), (1.0, 1.0)}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0%"), (1.0, "100%"), (0.99999, ">99.9%"), (0.00001, "<0.1%"), (0.5, "50.0%"), (None, "–")],
)
def test_percent_does_not_round_to_certainty(value: float | None, shown: str) -> None:
    assert formats.percent(value) == shown


def test_smoothing_starts_at_the_first_value() -> None:
    assert read.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert read.smoothed([1.0, 3.0])[0] == pytest.approx(1.0)
