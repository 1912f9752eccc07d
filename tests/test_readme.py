"""The README does what it says: its blocks are there, its Python runs, its figure and files exist."""

import re
import runpy
from functools import partial
from pathlib import Path

import pytest

from lightning_fot.request.request import find_config, read_request
from tests.support import markdown_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
blocks = partial(markdown_blocks.blocks, README)


def test_opens_with_a_sentence_a_figure_and_two_blocks():
    title, sentence, figure = [part for part in README.split("\n\n") if part.strip()][:3]
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    path = re.fullmatch(r"!\[.+\]\((.+)\)", figure)[1]
    assert (ROOT / path).stat().st_size > 10_000
    assert re.findall(r"!\[", README) == ["!["]
    # One command each. What start.py makes of them, tests/test_start_script.py says.
    assert blocks("sh") == ["python3 start.py\n", "python3 start.py test\n"]


def test_what_the_two_blocks_run_is_there():
    script = runpy.run_path(str(ROOT / "start.py"))
    verb, *words = script["MAIN_JOB"]
    assert [verb, *words] == ["run", "--config", "configs/hnsw.yaml"]
    assert find_config(words[1])[0].is_file()
    assert blocks("sh")[1].split()[-1] == script["TESTS"]
    # What .ci/run does is what the second block says.
    assert "block == 2" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_other_commands_name_configurations_that_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "--config" in line]
    assert lines
    for line in lines:
        words = line.partition("#")[0].split()
        find_config(words[words.index("--config") + 1])
        if "--data.paths" not in line:
            read_request("run", words[2:])


@pytest.mark.slow
def test_the_api_in_fifteen_lines_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (shipped,) = blocks("python")
    assert len(shipped.splitlines()) <= 15
    exec(compile(shipped, "README.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out
    assert "The secret code of the ship is 31415" in said
    assert "bytes a token" in said


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    page, _, heading = link.partition("#")
    assert (ROOT / page).exists()
    if heading:
        text = (ROOT / page).read_text(encoding="utf-8")
        titles = [line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"]
        assert heading in [re.sub(r"[^\w-]", "", title) for title in titles]  # as GitHub names them
