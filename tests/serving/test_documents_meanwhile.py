"""Documents that are read and forgotten while others ask, stop the server, or write into its folder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_fot.cli import main
from lightning_fot.library.library import Library
from tests.support.memories import SETTINGS, backbone, books, contents, text
from tests.support.patience import PATIENCE_S
from tests.support.serving import Room, Running, alone, answer, by_commands, running, until

PATH = "/v1/memories/mine/documents"
LONG = 1200


@pytest.mark.slow
def test_a_folder_that_is_damaged_or_gone_is_told_and_asked_as_it_was(room: Room, own: Room, fresh: Running) -> None:
    def problem() -> str | None:
        said: str | None = fresh.call("GET", PATH)[1]["problem"]
        return said

    path = own.libraries["mine"].path
    kept = (path / "memory.json").read_bytes()
    (path / "memory.json").write_text("{}", encoding="utf-8")
    until(problem)
    assert "memory.json" in str(problem())
    assert answer(fresh) == alone(room)
    (path / "memory.json").write_bytes(kept)
    until(lambda: problem() is None)
    path.rename(path.with_name("away"))
    until(problem)
    assert "is gone" in str(problem())
    assert answer(fresh) == alone(room)
    path.with_name("away").rename(path)
    until(lambda: problem() is None)


@pytest.mark.slow
def test_what_waits_is_bounded_and_read_when_the_folder_is_free(own: Room) -> None:
    """Another process writes to the memory: what comes is kept, and waits; what cannot wait is refused."""
    beside = Library.read(own.libraries["mine"].path)
    with running(own, max_documents_waiting=2) as small, beside.locked():
        for name, said in (("a.txt", text(7)), ("b.txt", text(8)), ("b.txt", text(8))):
            status, told = small.put("mine", name, said)
            # Places are counted before it is known that a text is there already.
            assert (status, told.get("status")) in ((202, "waiting"), (429, None))
        status, told = small.put("mine", "c.txt", text(9))
        assert (status, told["error"]["code"]) == (429, "queue_full")
        until(lambda: small.call("GET", f"{PATH}?name=a.txt")[1]["data"][0].get("detail"))
        status, told = small.forget("mine", "shelf/book0.txt")
        assert (status, told["error"]["code"]) == (409, "memory_busy")
        assert small.documents("mine")["shelf/book0.txt"] == "ready"
        assert small.number("fot_documents_waiting") == 2
    with running(own) as small:
        # What waited when the server stopped is read by the next one.
        small.until_read("mine")
        assert {small.documents("mine")[name] for name in ("a.txt", "b.txt")} == {"ready"}


def test_a_document_that_is_being_read_can_be_forgotten(room: Room, own: Room, fresh: Running) -> None:
    assert fresh.put("mine", "long.txt", text(5, LONG))[0] == 202
    until(lambda: fresh.call("GET", f"{PATH}?name=long.txt")[1]["data"][0]["read"])
    # Somebody else has to wait.
    (own.folder / "z.txt").write_text("z", encoding="utf-8")
    assert main(["ingest", str(own.libraries["mine"].path), str(own.folder / "z.txt")]) == 2
    assert fresh.forget("mine", "shelf/book2.txt")[0] == 200
    assert fresh.documents("mine").keys() == {"shelf/book0.txt", "shelf/book1.txt", "long.txt"}
    assert fresh.documents("mine")["long.txt"] == "reading"
    assert fresh.forget("mine", "long.txt")[0] == 200
    assert fresh.documents("mine").keys() == {"shelf/book0.txt", "shelf/book1.txt"}
    until(lambda: [one.name for one in Library.read(own.libraries["mine"].path).documents] ==
          ["shelf/book0.txt", "shelf/book1.txt"])  # fmt: skip


@pytest.mark.slow
def test_of_several_versions_the_last_one_counts(room: Room, own: Room, fresh: Running, tmp_path: Path) -> None:
    first, second = text(5, LONG // 3), text(8)
    assert fresh.put("mine", "new.txt", first)[0] == 202
    until(lambda: fresh.call("GET", f"{PATH}?name=new.txt")[1]["data"][0]["read"])
    for said in (second, first, second, first):
        assert fresh.put("mine", "new.txt", said)[0] == 202
    fresh.until_read("mine")
    expected = by_commands(room, tmp_path / "other", ("new.txt", first))
    assert answer(fresh) == alone(expected)
    assert list((own.libraries["mine"].path / "inbox").iterdir()) == [own.libraries["mine"].path / "inbox" / ".lock"]


@pytest.mark.slow
def test_a_server_that_stops_saves_what_it_has_read_and_goes_on(room: Room, own: Room, tmp_path: Path) -> None:
    with running(own) as first:
        assert first.put("mine", "long.txt", text(5, LONG))[0] == 202
        until(lambda: first.call("GET", f"{PATH}?name=long.txt")[1]["data"][0]["read"])
    assert not Library.read(own.libraries["mine"].path).documents[-1].done
    with running(own) as second:
        second.until_read("mine")
        # Its start was read by the other server.
        assert 0 < second.number("fot_document_tokens_total") < len(text(5, LONG))
    expected = by_commands(room, tmp_path / "other", ("long.txt", text(5, LONG)))
    assert contents(own.libraries["mine"].path) == contents(expected.libraries["mine"].path)


@pytest.mark.slow
def test_asks_go_on_while_documents_come_and_go(room: Room, own: Room, tmp_path: Path) -> None:
    """Each answer is that given alone over documents as they were at some time."""
    name, said, gone = "long.txt", text(5, LONG // 3), "shelf/book1.txt"
    states = {
        "before": room,
        "without": by_commands(room, tmp_path / "without", (gone, None)),
        "with": by_commands(room, tmp_path / "with", (name, said)),
        "after": by_commands(room, tmp_path / "after", (name, said), (gone, None)),
    }
    prompts = ["word5", said[:90], text(1)[40:70]]
    expected = {prompt: {state: alone(one, prompt) for state, one in states.items()} for prompt in prompts}
    assert len(set(expected[prompts[1]].values())) > 2
    with running(own, max_batch=4) as busy, ThreadPoolExecutor(len(prompts)) as pool:
        ended = threading.Event()

        def ask(prompt: str) -> list[str]:
            answers = []
            while not ended.is_set():
                answers.append(answer(busy, prompt))
            return [*answers, answer(busy, prompt)]

        asked = [pool.submit(ask, prompt) for prompt in prompts]
        try:
            assert busy.put("mine", name, said)[0] == 202
            until(lambda: busy.call("GET", f"{PATH}?name={name}")[1]["data"][0]["read"])
            assert busy.forget("mine", gone)[0] == 200
            assert busy.documents("mine")[name] == "reading"
            busy.until_read("mine")
        finally:
            ended.set()
        for prompt, one in zip(prompts, asked, strict=True):
            answers = one.result(PATIENCE_S)
            assert set(answers) <= set(expected[prompt].values())
            assert (answers[0], answers[-1]) == (expected[prompt]["before"], expected[prompt]["after"])
    assert contents(own.libraries["mine"].path) == contents(states["after"].libraries["mine"].path)


@pytest.mark.slow
def test_two_servers_of_one_folder(own: Room, tmp_path: Path) -> None:
    """The first takes documents, the second shows what the first has saved."""
    with running(own) as first, running(own.seen_by_another()) as second:
        status, told = second.put("mine", "new.txt", text(9))
        assert (status, told["error"]["code"]) == (409, "memory_busy")
        assert first.put("mine", "new.txt", text(9))[0] == 202
        first.until_read("mine")
        until(lambda: second.documents("mine").get("new.txt") == "ready")
        assert answer(second) == answer(first)
        # Forgetting needs no turn of its own.
        assert second.forget("mine", "new.txt")[0] == 200
        until(lambda: "new.txt" not in first.documents("mine"))
        assert first.put("mine", "newer.txt", text(8))[0] == 202
        first.until_read("mine")
    with running(own) as third:
        assert third.documents("mine").keys() == {f"shelf/book{number}.txt" for number in range(3)} | {"newer.txt"}


@pytest.mark.slow
def test_what_ingest_reads_beside_a_server_is_shown(own: Room, fresh: Running) -> None:
    (own.folder / "beside.txt").write_text(text(6), encoding="utf-8")
    before = answer(fresh)
    assert main(["ingest", str(own.libraries["mine"].path), str(own.folder / "beside.txt")]) == 0
    until(lambda: fresh.documents("mine").get("beside.txt") == "ready")
    own.libraries["mine"] = Library.read(own.libraries["mine"].path)
    assert answer(fresh) == alone(own) != before


@pytest.mark.slow
def test_with_windows_that_overlap_a_document_is_read_again_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its windows depend on those before, so what was cut is no part of the memory."""
    monkeypatch.chdir(tmp_path)
    backbone(tmp_path / "model")
    words = ["ingest", "mine", str(books(tmp_path / "shelf", 3)), *SETTINGS]
    assert main([*words, "--model.backbone=model", "--model.memory.overlap=8"]) == 0
    from lightning_fot.training.opening import open_model

    libraries = {"mine": Library.read(tmp_path / "memories" / "mine")}
    room = Room(tmp_path, *open_model(libraries["mine"].model), libraries)
    said, gone = text(5, LONG), "shelf/book1.txt"
    (tmp_path / "own").mkdir()
    own = room.copied(tmp_path / "own")
    with running(own) as first:
        assert first.put("mine", "long.txt", said)[0] == 202
        until(lambda: first.call("GET", f"{PATH}?name=long.txt")[1]["data"][0]["read"])
        assert first.forget("mine", gone)[0] == 200
        assert answer(first) == alone(by_commands(room, tmp_path / "without", (gone, None)))
    assert not Library.read(own.libraries["mine"].path).documents[-1].done
    with running(own) as second:
        assert gone not in second.documents("mine")
        second.until_read("mine")
        assert second.number("fot_document_tokens_total") == len(said)
        expected = by_commands(room, tmp_path / "other", (gone, None), ("long.txt", said))
        assert answer(second) == alone(expected)
    assert contents(own.libraries["mine"].path) == contents(expected.libraries["mine"].path)
