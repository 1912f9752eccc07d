"""Documents taken out of a memory: what goes, what stays as it was, and what a kill leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fot import Memory
from lightning_fot.cli import main
from lightning_fot.library.library import Library
from tests.support.memories import SETTINGS, Contents, books, contents
from tests.support.patience import PATIENCE_S
from tests.support.strikes import struck


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a memory of four books."""
    folder = tmp_path_factory.mktemp("made")
    books(folder / "shelf", 4)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["ingest", "mine", "shelf", *SETTINGS]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _without(before: Contents, *names: str) -> tuple[list[tuple[object, ...]], dict[str, torch.Tensor]]:
    """Documents and pairs that stay, cut out of what was there by the counts that the documents have."""
    kept = torch.cat([torch.full((stored,), name not in names) for name, _, stored, _ in before.documents])
    documents: list[tuple[object, ...]] = [one for one in before.documents if one[0] not in names]
    return documents, {name: pairs[..., kept, :] for name, pairs in before.pairs.items()}


def _is(after: Contents, documents: list[tuple[object, ...]], pairs: dict[str, torch.Tensor]) -> None:
    assert after.documents == documents
    assert after.listed == [(name, tokens) for name, tokens, *_ in documents]
    assert after.pairs.keys() == pairs.keys()
    for name, expected in pairs.items():
        assert torch.equal(after.pairs[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["shelf/book0.txt"], ["shelf/book3.txt", "shelf/book1.txt", "shelf/book3.txt"]])
def test_documents_go_and_the_rest_stays_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    before = contents(here / "memories" / "mine")
    assert main(["forget", "mine", *names]) == 0
    said = capsys.readouterr().out
    gone = sum(stored for name, _, stored, _ in before.documents if name in names)
    assert f"Forgot {', '.join(dict.fromkeys(names))}: {gone} tokens of each memory layer." in said
    assert f"memories/mine: {4 - len(set(names))} documents" in said
    _is(contents(here / "memories" / "mine"), *_without(before, *names))
    assert main(["ask", "mine", "What?", "--max_new_tokens=2"]) == 0
    # Ingested again, it is read again.
    capsys.readouterr()
    assert main(["ingest", "mine", "shelf"]) == 0
    assert f"Read {len(set(names))} document" in capsys.readouterr().out
    assert {name for name, *_ in contents(here / "memories" / "mine").documents} == {
        f"shelf/book{number}.txt" for number in range(4)
    }


def test_all_may_go(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", "mine", *(f"shelf/book{number}.txt" for number in range(4))]) == 0
    assert "memories/mine: 0 documents" in capsys.readouterr().out
    assert contents(here / "memories" / "mine").documents == []
    assert main(["ask", "mine", "What?"]) == 2
    assert "is empty" in capsys.readouterr().err


def test_a_mistake_changes_nothing_and_is_told_before_torch_is_loaded(repository: Path, here: Path) -> None:
    files = {path.name: path.read_bytes() for path in (here / "memories" / "mine").iterdir()}
    code = (
        "import sys\nfrom lightning_fot.cli import main\n"
        "for words in (['mine', 'shelf/book1.txt', 'shelf/bok2.txt'], ['mine'], [], ['other', 'x'], ['mine', '--x']):\n"
        "    print('#', main(['forget', *words]), 'torch' in sys.modules, file=sys.stderr, flush=True)\n"
        "assert main(['memories']) == main(['memories', 'mine']) == 0\n"
        "assert main(['forget', '--help']) == main(['memories', '--help']) == 0\n"
        "print('#', 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    *said, last = done.stderr.split("# 2 False\n")
    parts = (
        "DOCUMENT='shelf/bok2.txt': is not in memories/mine. Did you mean shelf/book2.txt? List them: ",
        "DOCUMENT=None: is missing",
        "MEMORY=None: is missing",
        "there is no folder memories/other. There are: mine.",
        "--x=None: is not an option of forget",
    )
    assert len(said) == len(parts), done.stderr
    for part, message in zip(parts, said, strict=True):
        assert part in message
    assert last == "# False\n"
    assert {path.name: path.read_bytes() for path in (here / "memories" / "mine").iterdir()} == files


def test_a_memory_that_is_being_written_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Library.read(here / "memories" / "mine").locked():
        assert main(["forget", "mine", "shelf/book1.txt"]) == 2
    assert "another process is writing to it" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_again_and_again_the_same_command_ends_it(repository: Path, here: Path) -> None:
    name, folder = "shelf/book1.txt", here / "memories" / "mine"
    expected = _without(contents(folder), name)
    codes, said = struck(repository, here, signal.SIGKILL, [*range(1, 16), 0], "forget", "mine", name)
    assert codes.count(-signal.SIGKILL) >= 5, said
    # Killed once all was done, the name is no longer known.
    assert codes[-1] == 0 or "is not in memories/mine" in said, said
    _is(contents(folder), *expected)


def test_what_was_to_be_forgotten_the_next_ingest_forgets(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = "shelf/book1.txt", here / "memories" / "mine"
    before = contents(folder)

    def stopped(memory: Memory, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "save", stopped)
        assert main(["forget", "mine", name]) == 130
    assert contents(folder).documents == before.documents
    capsys.readouterr()
    assert main(["memories", "mine"]) == 0
    assert "being forgotten" in capsys.readouterr().out
    (here / "more.txt").write_text("More of it.", encoding="utf-8")
    assert main(["ingest", "mine", "more.txt"]) == 0
    *kept, new = contents(folder).documents
    assert kept == _without(before, name)[0]
    assert new[0] == "more.txt"
