"""The file tree of the page on the architecture has every module, and no other."""

from pathlib import Path

from tests.file_tree import PAGE, listed, modules, sentence, tree
from tests.support.markdown_blocks import blocks, section

TREE = "\n".join(blocks(section(PAGE.read_text(encoding="utf-8"), "Every file"), "text"))


def test_every_module_is_listed_and_every_listed_file_is_there():
    named = listed(TREE)
    assert len(named) == len(set(named))
    missing, gone = sorted(set(modules()) - set(named)), sorted(set(named) - set(modules()))
    assert not missing, f"not in docs/architecture.md: {missing}; write it anew: python tests/file_tree.py"
    assert not gone, f"in docs/architecture.md, but not there: {gone}; write it anew: python tests/file_tree.py"


def test_each_has_a_line_that_says_what_it_is_for():
    assert all(len(line.split(maxsplit=1)[1]) > 15 for line in TREE.splitlines() if ".py" in line)
    assert all(len(line) <= 150 for line in TREE.splitlines())


def test_the_tree_that_is_written_is_the_one_that_is_read():
    assert listed(tree()) == modules()
    assert Path("evaluation/tasks/story.py") in listed(tree())
    assert sentence(Path("cli.py")).startswith("The command line")
