"""The page on retrievers does what it says: its Python runs, its plug-in has a name and keeps the contract."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch
from markdown_blocks import ROOT, blocks, section

from lightning_fot.retrievers import PerBankRetriever, create_retriever
from lightning_fot.testing import RetrieverContract

PAGE = (ROOT / "docs" / "retrievers.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = section(PAGE, "A retriever of your own")


@pytest.fixture
def distribution(tmp_path):
    """What installing the plug-in of the page would leave: its modules and its entry points."""
    project = tomllib.loads(blocks(OWN, "toml")[0])["project"]
    for block in blocks(OWN, "python"):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / named[1]).write_text(block, encoding="utf-8")
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, names),) = project["entry-points"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in names.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    return tmp_path, list(names)


def test_the_plugin_of_the_page_keeps_the_contract(distribution):
    folder, (name,) = distribution
    (test,) = folder.glob("test_*.py")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-m", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment, cwd=folder, check=False
        )

    tested = run("pytest", "-q", "-W", "error::RuntimeWarning", str(test))
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", tested.stdout)[1]) >= 25
    listed = run("lightning_fot", "retrievers")
    assert re.search(rf"^{name} .* ready", listed.stdout, flags=re.MULTILINE), listed.stdout


def test_it_takes_at_most_thirty_lines():
    assert len(blocks(OWN, "python")[0].splitlines()) <= 30


def test_the_readme_shows_the_same_code():
    shown = [ast.parse(block) for block in blocks(section(README, "A retriever of your own"), "python")]
    tested = [ast.parse(block) for block in blocks(OWN, "python")]
    # Comments and blank lines may differ.
    assert [ast.dump(tree) for tree in shown] == [ast.dump(tree) for tree in tested[: len(shown)]]


def test_python_blocks_run_one_after_the_other(capsys):
    scope = {"__name__": "page"}
    for block in blocks(PAGE, "python"):
        exec(compile(block, "docs/retrievers.md", "exec"), scope)
    assert issubclass(scope["GraphRetriever"], PerBankRetriever)
    assert issubclass(scope["TestGraph"], RetrieverContract)
    assert scope["rows"].shape == (3, 5, 32)
    retriever = create_retriever({"name": scope["GraphRetriever"], "ef_search": 9}, dim=4)
    retriever.add(torch.eye(4)[None])
    assert retriever.search(2 * torch.eye(4)[None], 1).flatten().tolist() == [0, 1, 2, 3]
    recall = [float(value) for value in re.findall(r"recall (\d\.\d+), mass", capsys.readouterr().out)]
    assert len(recall) == 3
    # What the section on transforms claims. Threads build the graph, so no two runs are alike to the second digit: on the head
    # that the page takes, the steps are .46, .87 and .95.
    assert recall[0] < recall[1] - 0.2 and recall[1] < recall[2] - 0.02


def test_every_public_member_is_described():
    members = {name for name in dir(PerBankRetriever) if not name.startswith("_")}
    assert [name for name in members if f"`{name}" not in PAGE and f".{name}" not in PAGE] == []


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", PAGE))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).exists()


@pytest.mark.parametrize("name", ["training", "distributed"])
def test_every_command_of_the_pages_on_training_is_understood(name):
    from lightning_fot.preflight import check_settings
    from lightning_fot.request import read_request

    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(lines) > 3
    for words in lines:
        assert words[0] == "lightning"
        assert words[1] in ("fit", "run")
        check_settings(read_request(words[1], words[2:]))
