from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_fot.report import load_results, print_tables, write_report
from lightning_fot.report.__main__ import main
from lightning_fot.report.content import curves, read, scales

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_write_report_lists_what_it_wrote(results: dict[str, Any], run_dir: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    written = write_report(results, run_dir)
    pictures = ["recall_vs_speed.png", "perplexity_vs_context.png", "time_split.png"]
    assert [path.name for path in written] == ["report.html", "time_split.csv", *pictures]
    assert all(path.read_bytes().startswith(PNG) for path in written[2:])
    assert not list(run_dir.glob(".*part"))
    assert dict(mpl.rcParams) == before


def test_figures_without_data_are_not_written(results: dict[str, Any], run_dir: Path) -> None:
    results |= {"retrieval": [], "exact": [], "time_split": []}
    assert [path.name for path in write_report(results, run_dir)] == ["report.html", "perplexity_vs_context.png"]


def test_exact_run_and_unused_index_can_be_drawn(results: dict[str, Any], run_dir: Path) -> None:
    results["retrieval"] = [dict(row) for row in results["exact"]]
    results["config"]["model"]["memory"]["retriever"] = "exact"
    assert len(write_report(results, run_dir)) == 5
    data = curves.recall_speed(results)
    assert data is not None
    assert [len(series.points) for series in data.series] == [1, 1]


def test_recall_axis_grows_and_keeps_one_apart(results: dict[str, Any]) -> None:
    data = curves.recall_speed(results)
    assert data is not None
    places = [data.place(recall) for recall in (0.7, 0.9, 0.99, 0.999, 1.0)]
    assert places == sorted(places)
    assert places[0] == 0.0
    assert places[-1] == 1.0
    assert places[-2] < 0.9
    assert data.label_names == ("ef_search",)
    assert [series.name for series in data.series] == ["layer 10", "layer 20"]
    assert [point.label for point in data.series[0].points if point.configured] == ["64"]
    assert [point.label for point in data.series[0].front()] == ["16", "32", "64", "128", "exact"]


@pytest.mark.slow
def test_distraction_is_drawn_beside_chance(results: dict[str, Any], run_dir: Path) -> None:
    rows = [("exact", 4, 0.4, 64), ("exact", 2, 0.6, 64), ("hnsw", 2, 0.5, 64), ("hnsw", 2, 0.9, 32)]
    results["distraction"] = [
        {"memory": memory, "documents": d, "own_share": share, "own_share_standard_error": 0.01, "context_tokens": size}
        for memory, d, share, size in rows
    ]
    exact, index, chance = curves.distraction_lines(results)
    assert (exact.contexts, exact.values, exact.errors) == ((2, 4), (0.6, 0.4), (0.01, 0.01))
    assert index.values == (0.5,)
    assert (chance.name, chance.values) == ("by chance", (0.5, 0.25))
    written = write_report(results, run_dir)
    assert run_dir / "distraction.png" in written
    assert "Distraction</h3><figure>" in written[0].read_text()


def test_runs_that_are_compared_have_colours_of_their_own(results: dict[str, Any]) -> None:
    measured = results["perplexity"]
    assert curves.styles(curves.perplexity_lines(results)) == ["k-none", "k-exact", "k-index"]
    results["perplexity"] = [
        {**row, "memory": f"{run}: {row['memory']}"}
        for run in ("a", "b")
        for row in measured
        if row["memory"] != "none"
    ]
    assert sorted(curves.styles(curves.perplexity_lines(results))) == ["c0", "c1", "c2", "c3"]


def test_error_bars_are_of_the_paired_difference_where_recorded(results: dict[str, Any]) -> None:
    plain, _, index = curves.perplexity_lines(results)
    assert plain.errors == (None, None, None)
    assert index.errors[0] == pytest.approx(6.702 * 0.008)
    for row in results["perplexity"]:
        row.pop("gain_standard_error", None)
    assert curves.perplexity_lines(results)[0].errors[0] == pytest.approx(6.914 * 0.031)


@pytest.mark.parametrize(("low", "high"), [(6.43, 6.91), (0.0, 0.0), (5.0, 5.0), (-3.0, 40_000.0), (1e-6, 3e-6)])
def test_linear_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = scales.nice_ticks(low, high)
    assert ticks[0][0] <= low
    assert ticks[-1][0] >= high
    assert len(ticks) < 12
    assert len({label for _, label in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(4_000.0, 50_000.0), (0.3, 0.4), (1.0, 1e7)])
def test_log_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = scales.log_ticks(low, high)
    assert ticks[0][0] <= low
    assert ticks[-1][0] >= high


def test_metrics_are_read_by_name(run_dir: Path) -> None:
    (curve,) = read.read_metrics(run_dir)
    assert curve.name == "train/loss"
    assert len(curve.values) == 60
    (run_dir / "metrics.csv").write_text("step,train/loss,other\n,,\n3,nan,1\n4,x,1\n5,2.5,1\n", encoding="utf-8")
    assert [(curve.steps, curve.values) for curve in read.read_metrics(run_dir)] == [((5.0,), (2.5,))]
    (run_dir / "metrics.csv").unlink()
    assert read.read_metrics(run_dir) == []


def printed(results: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_tables(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_on_the_terminal(results: dict[str, Any]) -> None:
    results["retrieval_in_run"] = [{"layer": 10, "recall": 0.961, "mass": 0.6, "sink_share": 0.02, "memory_tokens": 9}]
    text = printed(results)
    for shown in ("6.45 ± 0.20", "67% (4/6)", "hnsw ef_search=64", "97.4%", "2.7×", "40.1 MB", "96.1%", "2.0%"):
        assert shown in text
    assert "40.1 MB" in printed(results, 80)
    assert all(len(line.rstrip()) <= 80 for line in printed(results, 80).splitlines())


def test_numbers_are_never_cut_off(results: dict[str, Any]) -> None:
    """As many lengths as a long run has do not fit a narrow terminal: they go below each other."""
    results["tasks"] = [
        {"task": "dictionary", "context_tokens": 4**n, "memory": memory, "accuracy": 1.0, "n": 256}
        for n in range(6, 12)
        for memory in ("none", "exact", "faiss_ivf, nprobe=64")
    ]
    for width in (60, 80, 100, 200):
        text = printed(results, width)
        assert text.count("100% (256/256)") == 18
        assert "…" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert printed(results, 200).count("faiss_ivf, nprobe=64") == 1


def test_names_with_brackets_are_no_markup(results: dict[str, Any]) -> None:
    for row in results["perplexity"]:
        row["memory"] = row["memory"].replace("hnsw", "[red]mine[/x]")
    assert "[red]mine[/x]" in printed(results)


def test_nothing_measured_is_said() -> None:
    assert "Nothing was measured" in printed({})


@pytest.mark.slow
def test_reports_are_rebuilt_from_their_folders(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overview = tmp_path / "overview.png"
    assert main([str(run_dir), "--overview", str(overview)]) == 0
    assert overview.read_bytes().startswith(PNG)
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("[1]", encoding="utf-8")
    assert main([str(tmp_path)]) == 2


@pytest.mark.slow
def test_not_a_number_in_results_is_missing(results: dict[str, Any], run_dir: Path) -> None:
    results["perplexity"][3]["value"] = float("nan")
    results["retrieval"][0]["qps"] = float("inf")
    (run_dir / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert len(write_report(load_results(run_dir), run_dir)) == 5
