"""The README does what it says: its blocks are there, its Python runs, its figure and files exist."""

import re
from functools import partial
from pathlib import Path

import pytest

from lightning_fot.request.request import find_config, read_request
from tests.support import markdown_blocks

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
blocks = partial(markdown_blocks.blocks, README)


def test_opens_with_a_sentence_a_figure_and_two_blocks():
    title, sentence, figure = [part for part in README.split("\n\n") if part.strip()][:3]
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    path = re.fullmatch(r"!\[.+\]\((.+)\)", figure)[1]
    assert (Path(__file__).parent.parent / path).stat().st_size > 10_000
    main, test = blocks("sh")[:2]
    assert main.strip().endswith("lightning run --config configs/hnsw.yaml")
    assert test.strip().endswith("python -m pytest")


def test_other_commands_name_configurations_that_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "--config" in line]
    assert lines
    for line in lines:
        words = line.partition("#")[0].split()
        find_config(words[words.index("--config") + 1])
        if "--data.paths" not in line:
            read_request("run", words[2:])


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped, first, *others = blocks("python")
    exec(compile(shipped, "README.md", "exec"), {})
    assert "The secret code of the ship is 31415" in capsys.readouterr().out
    # The same code on a model that loads at once.
    smaller = first.replace("smollm2-135m", "tiny-random-llama").replace("[10, 20]", "[1, 3]")
    assert smaller != first
    exec(compile(smaller, "README.md", "exec"), {})
    assert "bytes a token" in capsys.readouterr().out
    for block in others:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    page, _, heading = link.partition("#")
    assert (Path(__file__).parent.parent / page).exists()
    if heading:
        text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
        titles = [line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"]
        assert heading in [re.sub(r"[^\w-]", "", title) for title in titles]  # as GitHub names them
