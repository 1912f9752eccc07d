"""``lightning ingest``: what is read, what is skipped, and what a stop or a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot import Memory, MemoryConfig, attach_memory
from lightning_fot.cli import main
from lightning_fot.library.library import Library
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone, load_tokenizer
from tests.support.memories import SETTINGS, Contents, backbone, books, contents, text
from tests.support.strikes import struck

OVERLAP = ("--model.memory.overlap=8", "--model.memory.sink_tokens=2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ingest(*words: str | Path) -> int:
    return main(["ingest", *map(str, words)])


def test_files_folders_and_lines_are_documents_and_the_memory_is_that_of_lm_ingest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books(here / "shelf", 1)
    (here / "shelf" / "deep").mkdir()
    (here / "shelf" / "deep" / "note.md").write_text(text(5), encoding="utf-8")
    (here / "code").mkdir()
    (here / "code" / "a.py").write_text("x = 1\n", encoding="utf-8")
    (here / "code" / "b.py").write_text("y = 2\n", encoding="utf-8")
    lines = [{"text": text(7, 20)}, {"text": "Ein Öl für 3 €."}]
    (here / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (here / "one.txt").write_text(text(9), encoding="utf-8")
    assert ingest("mine", "shelf", "code", "lines.jsonl", "one.txt", *SETTINGS) == 0
    said = capsys.readouterr()
    assert re.search(r"Read 6 documents, [\d,]+ tokens", said.out)
    assert "memories/mine: 6 documents" in said.out
    assert "ask mine" in said.out
    expected = {
        "shelf/book0.txt": text(0),
        "shelf/deep/note.md": text(5),
        "code": "# file: code/a.py\nx = 1\n\n# file: code/b.py\ny = 2\n",
        "lines.jsonl:1": text(7, 20),
        "lines.jsonl:2": "Ein Öl für 3 €.",
        "one.txt": text(9),
    }
    found = contents(here / "memories" / "mine")
    # The tokenizer's ids are bytes, three special tokens before them.
    ids = {name: [byte + 3 for byte in document.encode()] for name, document in expected.items()}
    assert {name: tokens for name, _, _, tokens in found.documents} == ids
    assert found.listed == [(name, count) for name, count, _, _ in found.documents]
    config = MemoryConfig(memory_layers=[1, 3], window=32, top_k=8, skip_window_start=1)
    lm = attach_memory(load_backbone("tiny-random-llama"), config)
    memory = lm.new_memory()
    for name, _, _, tokens in found.documents:
        lm.ingest(torch.tensor([tokens]), memory, document=name)
    for number, layer in memory.layers.items():
        torch.testing.assert_close(found.pairs[f"{number}.keys"], layer.keys)
        torch.testing.assert_close(found.pairs[f"{number}.values"], layer.values)


def test_documents_already_read_are_skipped_and_new_ones_added(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 2)
    assert ingest("mine", "shelf", *SETTINGS) == 0
    before = (here / "memories" / "mine" / "memory.json").read_bytes()
    assert ingest("mine", "shelf") == 0
    said = capsys.readouterr()
    assert "Nothing to read: memories/mine has all of it, 2 documents" in said.out
    assert (here / "memories" / "mine" / "memory.json").read_bytes() == before
    # A document is its text: moved it is the same, changed it replaces what it was; twice the same text is one.
    (here / "shelf" / "book0.txt").rename(here / "shelf" / "moved.txt")
    (here / "shelf" / "book1.txt").write_text(text(8), encoding="utf-8")
    (here / "shelf" / "copy.txt").write_text(text(8), encoding="utf-8")
    assert ingest("mine", "shelf") == 0
    said = capsys.readouterr()
    assert "Left out: 1 read already, 1 with the same text as another." in said.err
    assert "Read 1 document," in said.out
    names = [name for name, *_ in contents(here / "memories" / "mine").documents]
    assert names == ["shelf/book0.txt", "shelf/book1.txt"]


def test_what_is_no_text_is_named_and_the_rest_is_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 1)
    (here / "shelf" / "empty.txt").write_text(" \n", encoding="utf-8")
    (here / "shelf" / "picture.png").write_bytes(bytes(range(256)))
    # Looks like text as far as the first look goes.
    (here / "shelf" / "late.txt").write_bytes(b"a" * 100_000 + b"\xff")
    (here / "shelf" / "blank.txt").write_bytes(b"\n" * 70_000)
    lines = [
        '{"text": "cut \\ud83d"}',
        '{"text": "deep", "tree": ' + "[" * 99_999 + "]" * 99_999 + "}",
        "no json",
        '{"a": 1}',
    ]
    (here / "shelf" / "lines.jsonl").write_text("\n".join([*lines, '{"text": "good"}']), encoding="utf-8")
    for name in (b"caf\xe9.txt", b"caf\xe9.py", b"a [red]x[bold].txt", b"two\nlines.txt"):
        Path(os.fsdecode(bytes(here / "shelf") + b"/" + name)).write_text(os.fsdecode(name[:3]), encoding="utf-8")
    assert ingest("mine", "shelf", *SETTINGS) == 0
    said = capsys.readouterr()
    for part in ("2 binary or not UTF-8", "shelf/late.txt", "shelf/picture.png", "2 empty", "shelf/blank.txt",
                 *(f"shelf/lines.jsonl:{number}" for number in range(1, 5))):  # fmt: skip
        assert part in said.err
    assert "Read 6 documents," in said.out
    names = [entry.name for entry in Library.read(here / "memories" / "mine").documents]
    assert {"shelf/caf\\xe9.txt", "shelf", "shelf/lines.jsonl:5", "shelf/two\nlines.txt"} < set(names)
    # Nothing of it is in the way of the next time.
    assert ingest("mine", "shelf") == 0
    assert "Nothing to read" in capsys.readouterr().out
    assert ingest("other", "shelf/late.txt", *SETTINGS) == 2
    assert "holds no text (1 binary or not UTF-8 (shelf/late.txt))" in capsys.readouterr().err
    assert ingest("other", "shelf/empty.txt", *SETTINGS) == 2
    assert "holds no text (1 empty (shelf/empty.txt))" in capsys.readouterr().err


def test_an_error_loses_nothing_that_was_read(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    books(here / "shelf", 3)
    ordinary = MemoryLM.ingest

    def fails(lm: MemoryLM, ids: torch.Tensor, memory: Memory, **kw: Any) -> Memory:
        if kw["document"] == "shelf/book2.txt":
            raise RuntimeError("no more memory")
        return ordinary(lm, ids, memory, **kw)

    monkeypatch.setattr(MemoryLM, "ingest", fails)
    with pytest.raises(RuntimeError, match="no more memory"):
        ingest("mine", "shelf", *SETTINGS)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert [name for name, *_ in contents(here / "memories" / "mine").documents] == [
        "shelf/book0.txt",
        "shelf/book1.txt",
    ]
    capsys.readouterr()
    assert ingest("mine", "shelf") == 0
    said = capsys.readouterr()
    assert "2 read already" in said.err
    assert "Read 1 document" in said.out


def _held(here: Path) -> dict[str, str]:
    """What a memory holds, by name."""
    return {
        name: bytes(one - 3 for one in ids).decode()
        for name, _, _, ids in contents(here / "memories" / "mine").documents
    }


def test_a_changed_document_replaces_what_it_was(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, lines = here / "shelf" / "notes.txt", here / "shelf" / "log.jsonl"
    books(here / "shelf", 1)
    notes.write_text("The harbour opens at eight. " * 5, encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": f"record {n}"}) + "\n" for n in range(3)), encoding="utf-8")
    assert ingest("mine", "shelf", *SETTINGS) == 0
    # Edited twice; a log whose first line goes, whose second is edited, and which grows.
    for hour in ("nine", "ten"):
        notes.write_text(f"The harbour opens at {hour}. " * 5, encoding="utf-8")
        records = ["record 1", f"edited {hour}", "record 3"]
        lines.write_text("".join(json.dumps({"text": one}) + "\n" for one in records), encoding="utf-8")
        capsys.readouterr()
        assert ingest("mine", "shelf") == 0
        assert "shelf/notes.txt" in next(line for line in capsys.readouterr().err.splitlines() if "Forgets" in line)
        held = _held(here)
        assert held["shelf/notes.txt"] == f"The harbour opens at {hour}. " * 5
        assert sorted(text for name, text in held.items() if "jsonl" in name) == sorted(records)
        assert len(held) == 5
    # Copied before it is edited, its old text stands somewhere still.
    copy = here / "shelf" / "copy.txt"
    shutil.copy(notes, copy)
    notes.write_text("The harbour is closed.", encoding="utf-8")
    assert ingest("mine", "shelf/notes.txt") == 0
    assert ingest("mine", "shelf") == 0
    assert sorted(text for text in _held(here).values() if "harbour" in text) == [
        "The harbour is closed.",
        "The harbour opens at ten. " * 5,
    ]
    # Moved and edited, it leaves nothing behind.
    copy.rename(here / "shelf" / "moved.txt")
    assert ingest("mine", "shelf") == 0
    (here / "shelf" / "moved.txt").write_text("The harbour opens again.", encoding="utf-8")
    assert ingest("mine", "shelf") == 0
    assert sorted(text for text in _held(here).values() if "harbour" in text) == [
        "The harbour is closed.",
        "The harbour opens again.",
    ]


def _rewrite(here: Path, **texts: str) -> None:
    for name, words in texts.items():
        (here / "shelf" / f"{name}.txt").write_text(words, encoding="utf-8")


@pytest.mark.parametrize("extra", [(), OVERLAP])
def test_what_was_read_stays_until_what_replaces_it_is_in(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
) -> None:
    old = {"a": "The harbour opens at eight. " * 5, "b": "The mill is closed. " * 9, "c": "Nothing changes here. " * 4}
    new = {"a": "The harbour opens at ten. " * 5, "b": "The mill is open on Sundays. " * 9, "d": "Also new. " * 8}
    (here / "shelf").mkdir()
    _rewrite(here, **old)
    assert ingest("mine", "shelf", *SETTINGS, *extra) == 0
    _rewrite(here, **new)
    ordinary = MemoryLM.ingest
    # Whichever window of whichever document fails: each document is as it was, or as it is now.
    for moment in range(100):
        left = [moment]

        def fails(lm: MemoryLM, *args: Any, left: list[int] = left, **kw: Any) -> Memory:
            def shown(tokens: int, progress: Any = kw["progress"]) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise RuntimeError("no more memory")
                progress(tokens)

            return ordinary(lm, *args, **{**kw, "progress": shown})

        shutil.copytree(here / "memories" / "mine", here / "kept", dirs_exist_ok=False)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryLM, "ingest", fails)
            try:
                ended = ingest("mine", "shelf")
            except RuntimeError:
                ended = 1
        held = _held(here)
        for name in "abc":
            assert sorted(held[f"shelf/{name}.txt"]) in (sorted(old[name]), sorted(new.get(name, old[name]))), moment
        listed = {entry.name for entry in Library.read(here / "memories" / "mine").documents if entry.done}
        assert {"shelf/a.txt", "shelf/b.txt", "shelf/c.txt"} <= listed
        if ended == 0:
            break
        # From there on it comes to its end.
        assert ingest("mine", "shelf") == 0
        assert {name: sorted(words) for name, words in _held(here).items()} == {
            f"shelf/{name}.txt": sorted(words) for name, words in {**old, **new}.items()
        }
        shutil.rmtree(here / "memories" / "mine")
        (here / "kept").rename(here / "memories" / "mine")
    assert moment > 10


class _KilledError(BaseException):
    """Nothing of the work catches it, and nothing is written from then on."""


class _Killing:
    """Ends the work at one of its changes on the disk, and lets nothing be written afterwards: as a kill does."""

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: Any) -> None:
        if self.left is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        reads = event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        if not reads and "memories/mine" in str(arguments[0]):
            self.left -= 1
            if self.left < 0:
                raise _KilledError


_KILLING = _Killing()


def _killed(moment: int, *words: str) -> bool:
    """Whether the command did not survive that change on the disk."""
    _KILLING.left = moment
    try:
        assert ingest(*words) == 0
    except _KilledError:
        return True
    finally:
        _KILLING.left = None
    return False


@pytest.mark.slow
def test_killed_at_any_moment_each_document_is_as_it_was_or_as_it_is(here: Path) -> None:
    old = {"a": "The harbour opens at eight. " * 5, "b": "The mill is closed. " * 9, "c": "Swapped with d. " * 4}
    old["d"] = "Swapped with c, and longer. " * 4
    new = {**old, "a": "The harbour opens at ten. " * 5, "b": "Open on Sundays. " * 9, "c": old["d"], "d": old["c"]}
    (here / "shelf").mkdir()
    _rewrite(here, **old)
    assert ingest("mine", "shelf", *SETTINGS) == 0
    _rewrite(here, **new)
    mine, kept = here / "memories" / "mine", here / "kept"
    shutil.copytree(mine, kept)
    for moment in range(200):
        killed = _killed(moment, "mine", "shelf")
        held = _held(here)
        assert held["shelf/a.txt"] in (old["a"], new["a"]), moment
        assert held["shelf/b.txt"] in (old["b"], new["b"]), moment
        assert [held["shelf/c.txt"], held["shelf/d.txt"]] in ([old["c"], old["d"]], [new["c"], new["d"]]), moment
        listed = {entry.name: entry for entry in Library.read(mine).documents}
        assert set(listed) == {name for name, entry in listed.items() if entry.done} == set(held), moment
        for name, words in held.items():
            assert listed[name].digest == hashlib.sha256(words.encode()).hexdigest(), (moment, name)
        if not killed:
            break
        assert ingest("mine", "shelf") == 0
        assert _held(here) == {f"shelf/{name}.txt": words for name, words in new.items()}
        shutil.rmtree(mine)
        shutil.copytree(kept, mine)
    assert moment > 10


def test_documents_have_the_names_of_their_places(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"a": "Of the harbour. " * 5, "b": "Of the mill. " * 9, "c": "Of the bridge. " * 4}
    (here / "shelf").mkdir()
    _rewrite(here, **old)
    assert ingest("mine", "shelf", *SETTINGS) == 0
    # Two have changed places.
    _rewrite(here, a=old["b"], b=old["a"])
    capsys.readouterr()
    assert ingest("mine", "shelf") == 0
    assert "shelf/a.txt is called shelf/b.txt" in capsys.readouterr().err
    assert _held(here) == {"shelf/a.txt": old["b"], "shelf/b.txt": old["a"], "shelf/c.txt": old["c"]}
    assert ingest("mine", "shelf") == 0
    assert "Nothing to read" in capsys.readouterr().out
    # All three move on by one, as logs do: the last one goes, and the first place has another text.
    _rewrite(here, c=old["a"], b=old["b"], a="A new one. " * 7)
    assert ingest("mine", "shelf") == 0
    assert "Read 1 document," in capsys.readouterr().out
    expected = {"shelf/c.txt": old["a"], "shelf/b.txt": old["b"], "shelf/a.txt": "A new one. " * 7}
    assert _held(here) == expected
    assert {entry.name: Path(entry.places[0]).name for entry in Library.read(here / "memories" / "mine").documents} == {
        name: Path(name).name for name in expected
    }
    assert main(["forget", "mine", "shelf/b.txt"]) == 0
    assert list(_held(here)) == ["shelf/c.txt", "shelf/a.txt"]


def test_a_text_that_changes_while_it_is_found_is_not_taken_for_what_was_found(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_fot.commands import ingest as command

    (here / "shelf").mkdir()
    _rewrite(here, a="As it was. " * 5, b="As it was, too. " * 5)
    assert ingest("mine", "shelf", *SETTINGS) == 0
    _rewrite(here, a="As it is. " * 5, b="As it is, too. " * 5, c="New. " * 9, d="New as well. " * 9)
    ordinary = command._read

    def meanwhile(*args: Any) -> int:
        _rewrite(here, a="As it will be. " * 5)
        (here / "shelf" / "c.txt").unlink()
        return ordinary(*args)

    monkeypatch.setattr(command, "_read", meanwhile)
    assert ingest("mine", "shelf") == 0
    said = capsys.readouterr()
    assert "shelf/a.txt" in said.err
    assert "shelf/c.txt" in said.err
    assert "Read 2 documents," in said.out
    assert _held(here) == {"shelf/a.txt": "As it was. " * 5, "shelf/b.txt": "As it is, too. " * 5,
                           "shelf/d.txt": "New as well. " * 9}  # fmt: skip
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ingest("mine", "shelf") == 0
    assert _held(here)["shelf/a.txt"] == "As it will be. " * 5


def test_other_documents_of_the_same_name_are_kept_and_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        (here / folder / "docs").mkdir(parents=True)
        (here / folder / "docs" / "n.txt").write_text(f"of {folder}", encoding="utf-8")
    assert ingest("mine", "a/docs", *SETTINGS) == 0
    capsys.readouterr()
    assert ingest("mine", "b/docs") == 0
    assert "Another document has this name, and both are kept: docs/n.txt" in capsys.readouterr().err
    assert _held(here) == {"docs/n.txt": "of a", "docs/n.txt (2)": "of b"}
    # Each follows its own file from then on.
    (here / "b" / "docs" / "n.txt").write_text("of b, later", encoding="utf-8")
    assert ingest("mine", "b/docs") == 0
    assert sorted(_held(here).values()) == ["of a", "of b, later"]


@pytest.mark.slow
def test_a_deleted_document_is_told_and_can_be_forgotten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 3)
    # Too short to store anything beyond what skip_window_start leaves out.
    (here / "shelf" / "short.txt").write_text("a", encoding="utf-8")
    assert ingest("mine", "shelf", *SETTINGS) == 0
    assert main(["memories"]) == 0
    assert re.search(r"mine +4 +\S+ +\S+ MiB +tiny-random-llama", capsys.readouterr().out)
    (here / "shelf" / "book1.txt").unlink()
    assert ingest("mine", "shelf") == 0
    said = capsys.readouterr()
    command = re.search(r"No longer there, still in the memory: shelf/book1.txt. To forget: (.*)", said.err)
    assert command is not None
    words = shlex.split(command[1])
    assert main([*words[words.index("forget") :], "shelf/short.txt"]) == 0
    said = capsys.readouterr()
    assert "2 documents" in said.out
    assert list(_held(here)) == ["shelf/book0.txt", "shelf/book2.txt"]
    assert main(["memories", "mine"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:3]] == ["shelf/book0.txt", "shelf/book2.txt"]
    assert main(["forget", "mine", "shelf/book9.txt"]) == 2
    assert "Did you mean shelf/book" in capsys.readouterr().err
    assert main(["forget", "mine"]) == 2
    # What is left is what was read, and answers are given beside it.
    assert ingest("mine", "shelf") == 0
    assert _held(here)["shelf/short.txt"] == "a"
    assert main(["ask", "mine", "What?", "--max_new_tokens=2"]) == 0


def test_a_list_of_the_first_format_opens_and_is_kept_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 2)
    assert ingest("mine", "shelf", *SETTINGS) == 0
    file = here / "memories" / "mine" / "library.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    old = [{key: one[key] for key in ("name", "source", "digest", "tokens", "read_at")} for one in content["documents"]]
    file.write_text(json.dumps({"format": 1, "model": content["model"], "documents": old}, indent=2), encoding="utf-8")
    assert ingest("mine", "shelf") == 0
    assert "Nothing to read" in capsys.readouterr().out
    # From now on its places are known.
    (here / "shelf" / "book1.txt").write_text("later", encoding="utf-8")
    assert ingest("mine", "shelf") == 0
    assert _held(here) == {"shelf/book0.txt": text(0), "shelf/book1.txt": "later"}


def test_settings_are_the_memorys_and_others_are_refused_by_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books(here / "shelf", 1)
    assert ingest("mine", "shelf", *SETTINGS, "--model.memory.capacity=4000") == 0
    (here / "more.txt").write_text(text(4), encoding="utf-8")
    for words, part in (
        (["--model.memory.window=64"], "model.memory.window=64: memories/mine was made with model.memory.window=32"),
        (["--model.backbone=smollm2-135m"], "model.backbone='smollm2-135m'"),
        (["--model.memory.capacity=null"], "model.memory.capacity=4000"),
        (["--config=smoke"], "model.memory.window=64: memories/mine was made with model.memory.window=32"),
        (["--model.memory.windw=64"], "Did you mean model.memory.window"),
        (["--model.memory.dtype=int4"], "model.memory.dtype='int4'"),
        (["--ckpt_path=nowhere.ckpt"], "there is no file nowhere.ckpt"),
    ):
        assert ingest("mine", "more.txt", *words) == 2, words
        assert part in capsys.readouterr().err
    # The same again, and what is the machine's business, may be given.
    assert ingest("mine", "more.txt", *SETTINGS, "--model.memory.capacity=4000", "--model.memory.offload_dir=.") == 0
    model = Library.read(here / "memories" / "mine").model
    assert (model.memory["window"], model.memory["capacity"], model.memory["offload_dir"]) == (32, 4000, ".")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # Of the shipped weights, overlap and sink are not for windows and layers of somebody else's.
        (("memory_layers=[1,3]", "window=64"), {"window": 64, "overlap": 0, "sink_tokens": 0, "positions": "first"}),
        ((), {"memory_layers": "all", "window": 512, "overlap": 128, "sink_tokens": 4, "positions": "constant"}),
        (("window=32",), {"memory_layers": "all", "window": 32, "overlap": 8, "sink_tokens": 4}),
        (("overlap=16", "window=64"), {"overlap": 16, "sink_tokens": 4}),
    ],
)
def test_another_backbone_has_no_settings_of_the_shipped_weights(
    here: Path, words: tuple[str, ...], expected: dict[str, Any]
) -> None:
    (here / "note.txt").write_text(text(1), encoding="utf-8")
    named = [f"--model.memory.{word}" for word in words]
    assert ingest("mine", "note.txt", "--model.backbone=tiny-random-llama", *named) == 0
    memory = Library.read(here / "memories" / "mine").model.memory
    assert {key: memory[key] for key in expected} == expected


def test_a_backbone_with_settings_of_its_own_is_read_with_them(here: Path) -> None:
    (here / "note.txt").write_text(text(1), encoding="utf-8")
    with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(memory_layers=[2], window=48, top_k=5)) as lm:
        lm.save_pretrained(here / "own")
    load_tokenizer("tiny-random-llama").save_pretrained(here / "own")
    assert ingest("mine", "note.txt", "--model.backbone=own") == 0
    memory = Library.read(here / "memories" / "mine").model.memory
    assert (memory["memory_layers"], memory["window"], memory["top_k"], memory["overlap"]) == ([2], 48, 5, 0)


@pytest.mark.slow
def test_the_oldest_go_beyond_the_capacity_and_are_not_read_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books(here / "shelf", 4)
    assert ingest("mine", "shelf", *SETTINGS, "--model.memory.capacity=300") == 0
    found = contents(here / "memories" / "mine")
    assert found.pairs["1.keys"].shape[-2] == 300
    assert sum(stored for _, _, stored, _ in found.documents) == 300
    assert found.documents[-1][0] == "shelf/book3.txt"
    assert len(found.listed) == 4 > len(found.documents)
    capsys.readouterr()
    assert ingest("mine", "shelf") == 0
    assert "Nothing to read" in capsys.readouterr().out


def test_a_memory_that_is_being_written_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 2)
    assert ingest("mine", "shelf/book0.txt", *SETTINGS) == 0
    library = Library.read(here / "memories" / "mine")
    with library.locked():
        assert ingest("mine", "shelf") == 2
    assert "another process is writing to it" in capsys.readouterr().err
    assert ingest("mine", "shelf") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("library.json", "{", "library.json is damaged"),
        ("library.json", '{"format": 1}', "library.json is damaged (KeyError: 'model')"),
        ("library.json", '{"format": 9}', "has format 9"),
        ("memory.json", "", "memory.json is damaged"),
        ("memory.json", '{"format": 2}', "memory.json is damaged"),
        ("memory-", None, "is missing, cut short or altered"),
        ("log-", None, "is damaged"),
    ],
)
def test_damage_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, part: str
) -> None:
    books(here / "shelf", 2)
    assert ingest("mine", "shelf/book0.txt", *SETTINGS) == 0
    (path,) = (here / "memories" / "mine").glob(f"{file}*")
    if content is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text(content, encoding="utf-8")
    for words in (["ingest", "mine", "shelf"], ["ask", "mine", "What?"]):
        capsys.readouterr()
        assert main(words) == 2
        assert part in capsys.readouterr().err


def test_a_memory_of_other_weights_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 2)
    backbone(here / "model")
    assert ingest("mine", "shelf/book0.txt", *SETTINGS, "--model.backbone=model") == 0
    backbone(here / "model", seed=1)
    for words in (["ingest", "mine", "shelf"], ["ask", "mine", "What?"]):
        assert main(words) == 2
        assert "made by another model: weights differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "MEMORY=None: is missing. Write: "),
        (["mine"], "PATH=None: is missing. Write: "),
        (["mine", "nowhere.txt"], "PATH='nowhere.txt': does not exist"),
        (["shelf", "shelf/book0.txt", "--window=3"], "--window"),
        (["mine", "shelf", "--config"], "has no value"),
        (["mine", "shelf", "--model.memory.window=0"], "model.memory.window=0"),
        (["mine", "shelf", "--model.memory.retriever=hnws"], "hnws"),
        (["mine", "shelf", "--config=nowhere"], "config='nowhere'"),
        (["mine", "shelf", "--model.rope={type: linear, factor: 2.0}"], "is applied by run and fit alone"),
        (["shelf/", "shelf/book0.txt"], "is a folder of other things"),
        (["shelf/book0.txt", "shelf"], "is a file"),
        (["", "shelf"], "is empty"),
    ],
)
def test_mistakes_leave_nothing_behind(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    books(here / "shelf", 1)
    assert ingest(*words) == 2
    assert part in capsys.readouterr().err
    assert not (here / "memories").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest("--help") == 0
    assert "MEMORY PATH" in capsys.readouterr().out


def _struck(repository: Path, here: Path, number: int, moments: list[int], *words: str) -> tuple[list[int], str]:
    """Exit codes of one attempt to ingest after the other, and all that they said."""
    return struck(repository, here, number, moments, "ingest", *words)


def _undisturbed(repository: Path, here: Path, *words: str) -> Contents:
    codes, said = _struck(repository, here, signal.SIGKILL, [0], *words)
    assert codes == [0], said
    folder = here / "memories" / "mine"
    found = contents(folder)
    folder.rename(here / "undisturbed")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("extra", [OVERLAP, ("--model.memory.capacity=400", "--model.memory.dtype=int8")])
def test_killed_again_and_again_the_memory_is_that_of_an_undisturbed_run(
    repository: Path, here: Path, extra: tuple[str, ...]
) -> None:
    books(here / "shelf", 4)
    words = ("mine", "shelf", *SETTINGS, *extra)
    expected = _undisturbed(repository, here, *words)
    # With an overlap only whole documents are saved: there are fewer moments to strike.
    draw, last = random.Random(0), 10 if extra is OVERLAP else 120
    moments = [*range(1, 6), *(draw.randint(6, last) for _ in range(5))]
    codes, said = _struck(repository, here, signal.SIGKILL, [*moments, 0], *words)
    assert codes[-1] == 0, said
    assert codes.count(-signal.SIGKILL) == len(codes) - 1 >= 6
    assert contents(here / "memories" / "mine") == expected
    left = {path.name.partition("-")[0] for path in (here / "memories" / "mine").iterdir()}
    assert left == {".lock", "library.json", "memory.json", "memory", "log", "README.md"}


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "number"), [((), signal.SIGINT), (OVERLAP, signal.SIGTERM)])
def test_stopped_it_saves_and_says_how_to_go_on(
    repository: Path, here: Path, extra: tuple[str, ...], number: int
) -> None:
    books(here / "shelf", 3)
    words = ("mine", "shelf", *SETTINGS, *extra)
    expected = _undisturbed(repository, here, *words)
    codes, said = _struck(repository, here, number, [9, 7, 12, 0], *words)
    assert codes[0] == 128 + number, said
    assert codes[-1] == 0, said
    assert "Traceback" not in said
    assert "Stopped and saved" in said
    (command,) = {line for line in said.splitlines() if " ingest mine shelf " in line}
    assert shlex.split(command)[-len(words) :] == list(words)
    assert ("will be read again from its start" in said) is bool(extra)
    assert contents(here / "memories" / "mine") == expected


@pytest.mark.slow
def test_a_document_that_changed_after_a_cut_is_read_as_it_is_now(repository: Path, here: Path) -> None:
    """Also when the run that forgets the old text is itself killed, anywhere."""
    books(here / "shelf", 2, words=60)
    words = ("mine", "shelf", *SETTINGS)
    folder = here / "memories" / "mine"
    # Killed late enough, the run is within the second document.
    for moment in range(180, 600, 40):
        _struck(repository, here, signal.SIGKILL, [moment], *words)
        partial = contents(folder)
        if len(partial.documents) == 2 and partial.listed[1][1] is None:
            break
        shutil.rmtree(folder)
    assert partial.listed[1][1] is None
    assert 0 < partial.documents[1][1] < len(text(1, 65))
    (here / "shelf" / "book1.txt").write_text(text(30, 65), encoding="utf-8")
    codes, said = _struck(repository, here, signal.SIGKILL, [*range(1, 12, 2), 0], *words)
    assert codes[-1] == 0, said
    found = contents(folder)
    folder.rename(here / "cut")
    assert found == _undisturbed(repository, here, *words)


@pytest.mark.slow
def test_a_trained_run_reads_and_answers_with_its_own_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books(here / "shelf", 4, words=200)
    words = ["--config", "smoke", "--data.paths=[shelf]", "--data.max_documents=null", "--trainer.max_steps=2"]
    assert main(["fit", *words, "--run_dir=run"]) == 0
    assert ingest("plain", "shelf/book0.txt", "--config", "run/config.yaml") == 0
    assert ingest("trained", "shelf/book0.txt", "--config", "run/config.yaml", "--ckpt_path", "last") == 0
    checkpoint = Library.read(here / "memories" / "trained").model.checkpoint
    assert checkpoint == str(here / "run" / "checkpoints" / "last.ckpt")
    plain, trained = (contents(here / "memories" / name) for name in ("plain", "trained"))
    assert plain.documents == trained.documents
    assert not torch.equal(plain.pairs["3.keys"], trained.pairs["3.keys"])
    # What is added later is read by the same weights, named or not; others are refused.
    assert ingest("trained", "shelf/book1.txt") == 0
    assert main(["ask", "trained", "What?", "--max_new_tokens=3"]) == 0
    capsys.readouterr()
    assert ingest("trained", "shelf/book2.txt", "--config", "run/config.yaml") == 2
    assert "ckpt_path=None" in capsys.readouterr().err
    Path(checkpoint).unlink()
    assert main(["ask", "trained", "What?"]) == 2
    assert "no such file" in capsys.readouterr().err
