"""The list of a library on disk: what a document costs, what kills and changes leave, and what is believed."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from lightning_fot import MemoryConfig
from lightning_fot.errors import SettingError
from lightning_fot.library.journal import FILE, JOURNAL
from lightning_fot.library.library import Entry, Library
from lightning_fot.request.model import ModelSettings

MODEL = ModelSettings("tiny-random-llama", asdict(MemoryConfig(memory_layers=[1, 3])))


def _digest(number: int) -> str:
    return f"{number:064x}"


def _library(path: Path, count: int) -> Library:
    path.mkdir(parents=True)
    entries = [Entry(f"many.jsonl:{n}", f"many.jsonl:{n}", _digest(n), places=[f"/many:{n}"]) for n in range(count)]
    library = Library(path, MODEL, entries)
    library.write()
    return library


def _state(library: Library) -> list[dict[str, object]]:
    return [asdict(entry) for entry in library.documents]


def test_the_cost_of_a_document_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    written, asked = [], []
    for count in (10, 2000):
        library = _library(tmp_path / str(count), count)
        whole = (library.path / FILE).read_bytes()
        library.add("new", _digest(count)).tokens = 3
        library.write()
        first = (library.path / JOURNAL).stat().st_size
        library.add("newer", _digest(count + 1))
        library.write()
        written.append((library.path / JOURNAL).stat().st_size - first)
        assert (library.path / FILE).read_bytes() == whole
        # Names that are taken are not tried one by one.
        calls = 0

        class Names(dict[str, Entry]):
            def __contains__(self, name: object) -> bool:
                nonlocal calls
                calls += 1
                return super().__contains__(name)

        library._entries = Names(library._entries)
        for number in range(count):
            library.add("same", _digest(10 * count + number))
        asked.append(calls / count)
    assert written[1] <= written[0] + 8
    assert max(asked) <= 3


def test_the_journal_and_the_whole_say_the_same(tmp_path: Path) -> None:
    draw = random.Random(0)
    library = _library(tmp_path / "mine", 5)
    for number in range(60):
        kind = draw.choice(["add", "add", "change", "remove", "whole"])
        if kind == "add":
            library.add(draw.choice(["a", "b \u00fc", "c\n"]), _digest(100 + number), [f"/{number}"])
        elif kind == "whole":
            library.write_whole()
        elif library.documents:
            entry = draw.choice(library.documents)
            if kind == "remove":
                library.remove(entry)
            else:
                entry.places, entry.leaving = [*entry.places, f"/{number}"], draw.random() < 0.5
                library.changed(entry)
        library.write()
        assert _state(Library.read(library.path)) == _state(library)
    # Whatever a kill leaves of the last line, the lines before it count.
    library.write_whole()
    before = _state(library)
    library.add("last", _digest(999))
    library.write()
    whole = (library.path / JOURNAL).read_bytes()
    for length in range(len(whole)):
        (library.path / JOURNAL).write_bytes(whole[:length])
        assert _state(Library.read(library.path)) == before
    # A journal that a kill left beside a newer list counts for nothing.
    library.write_whole()
    (library.path / JOURNAL).write_bytes(whole)
    assert _state(Library.read(library.path)) == _state(library)


def test_an_altered_byte_is_told(tmp_path: Path) -> None:
    draw = random.Random(1)
    library = _library(tmp_path / "mine", 3)
    for number in range(4):
        library.add(f"new {number}", _digest(10 + number))
    library.write()
    right = _state(library)
    told = 0
    for name in (FILE, JOURNAL):
        file = library.path / name
        whole = file.read_bytes()
        for _ in range(150):
            place = draw.randrange(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
            try:
                read = _state(Library.read(library.path))
            except SettingError as error:
                told += "damaged" in str(error) or "format" in str(error)
                continue
            # Only what means the same in JSON, such as another space.
            assert read == right
        file.write_bytes(whole)
    assert told > 250


def test_the_end_of_the_journal_is_no_kill_where_it_was_altered(tmp_path: Path) -> None:
    library = _library(tmp_path / "mine", 3)
    library.add("new", _digest(10))
    library.write()
    file = library.path / JOURNAL
    whole = file.read_bytes()
    for last in set(range(256)) - {whole[-1]}:
        file.write_bytes(whole[:-1] + bytes([last]))
        with pytest.raises(SettingError, match=r"library\.journal was altered"):
            Library.read(library.path)


def test_the_list_knows_settings_by_layer(tmp_path: Path) -> None:
    """Numbers of layers become words in JSON, which are sorted in another order."""
    spec = {"layers": {3: "exact", 20: "hnsw"}}
    model = ModelSettings("x", asdict(MemoryConfig(memory_layers=[3, 20], retriever=spec)))
    library = Library(tmp_path, model)
    library.add("new", _digest(1))
    library.write()
    library.add("newer", _digest(2))
    library.write()
    read = Library.read(tmp_path)
    assert _state(read) == _state(library)
    assert read.model.config.retriever == {"layers": {"3": "exact", "20": "hnsw"}}


def test_what_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a line may be on the disk, and nothing may follow it."""
    from lightning_fot.library import journal

    def full(path: Path, data: bytes, durable: bool) -> None:
        with path.open("ab") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    library = _library(tmp_path / "mine", 3)
    library.add("new", _digest(10))
    library.write()
    before = _state(library)
    library.add("newer", _digest(11))
    with monkeypatch.context() as patch:
        patch.setattr(journal, "append_bytes", full)
        with pytest.raises(SettingError, match="No space left on device"):
            library.write()
    assert _state(Library.read(library.path)) == before
    library.add("newest", _digest(12))
    library.write()
    assert _state(Library.read(library.path)) == _state(library)


@pytest.mark.slow
def test_readers_beside_a_writer_see_what_was_written(tmp_path: Path) -> None:
    """Also while the journal is joined into the list: no document is missing in between."""
    import threading

    library = _library(tmp_path / "mine", 3)
    ended = threading.Event()
    counts: list[int] = []
    wrong: list[BaseException] = []

    def look() -> None:
        try:
            while not ended.is_set() or not counts:
                counts.append(len(Library.read(library.path)))
        except BaseException as error:
            wrong.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(150):
        library.add(f"new {number}", _digest(100 + number))
        library.write()
        if number % 3 == 2:
            library.write_whole()
    ended.set()
    reader.join()
    assert not wrong
    assert counts == sorted(counts)
    assert len(Library.read(library.path)) == 153


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"format": 1}', "is damaged (KeyError: 'model')"),
        ('{"format": 9}', "has format 9"),
        ('{"format": "1"}', "has format '1'"),
        ('{"format": true}', "has format True"),
        ('{"format": 1, "model": {"backbone": "x", "memory": 3}, "documents": []}', "is damaged"),
        ('{"format": 1, "model": {"backbone": "x", "memory": {}}, "documents": [{"name": 3}]}', "is damaged"),
        ('{"format": 1, "model": {"backbone": "x", "memory": {}}, "documents": 3}', "is damaged"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    with pytest.raises(SettingError) as refused:
        Library.read(tmp_path)
    assert part in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "spec", ["evil.Index", {"name": "evil.Index", "M": 3}, {"layers": {"1": "exact", "3": "evil.Index"}}]
)
def test_a_strangers_list_may_name_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: object
) -> None:
    from lightning_fot.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Index: pass\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("A text.", encoding="utf-8")
    words = ["--config=smoke", "--model.memory.window=32", "--model.memory.retriever=exact"]
    assert main(["ingest", "./mine", "a.txt", *words]) == 0
    library = Library.read(Path("mine"))
    library.model = ModelSettings("tiny-random-llama", {**library.model.memory, "retriever": spec})
    library.write()
    (tmp_path / "b.txt").write_text("Another.", encoding="utf-8")
    for command in (
        ["ingest", "./mine", "b.txt"],
        ["ask", "./mine", "What?"],
        ["ask", "./mine", "What?", "--model.memory.top_k=4"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "evil.Index" in said
        assert "name it yourself" in said
        assert not (tmp_path / "ran").exists()
    # Lists and forgets need none; an answer is given with one that the user names.
    assert main(["memories", "./mine"]) == 0
    assert main(["ask", "./mine", "What?", "--max_new_tokens=2", "--model.memory.retriever=exact"]) == 0
    assert not (tmp_path / "ran").exists()


def test_the_index_of_a_memory_leads_into_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    index = {"format": 2, "log": {"file": "../log.safetensors"}, "lengths": [1]}
    (tmp_path / "mine" / "memory.json").write_text(json.dumps(index), encoding="utf-8")
    # Whoever opened it would wait for ever.
    os.mkfifo(tmp_path / "log.safetensors")
    from lightning_fot.library.library import Saved

    with pytest.raises(SettingError, match=r"memory\.json is damaged"):
        Saved.read(tmp_path / "mine")
