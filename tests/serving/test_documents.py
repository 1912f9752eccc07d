"""Documents over HTTP, against the commands that do the same to a memory on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from lightning_fot.library.library import Library
from tests.support.memories import contents, text
from tests.support.patience import PATIENCE_S
from tests.support.serving import Room, Running, alone, answer, by_commands, running, until

PATH = "/v1/memories/mine/documents"
LONG = 1200


def test_an_upload_is_read_as_ingest_reads_it(room: Room, own: Room, fresh: Running, tmp_path: Path) -> None:
    status, told = fresh.put("mine", "new.txt", text(9))
    assert (status, told["name"], told["tokens"]) == (202, "new.txt", len(text(9)))
    assert told["status"] in ("waiting", "reading", "ready")
    fresh.until_read("mine")
    assert fresh.documents("mine") == dict.fromkeys(
        ["shelf/book0.txt", "shelf/book1.txt", "shelf/book2.txt", "new.txt"], "ready"
    )
    expected = by_commands(room, tmp_path / "other", ("new.txt", text(9)))
    assert answer(fresh) == alone(expected) != alone(room)
    assert contents(own.libraries["mine"].path) == contents(expected.libraries["mine"].path)
    _, found = fresh.call("GET", f"{PATH}?name=new.txt")
    (stored,) = (one.stored for one in expected.memory("mine").documents if one.name == "new.txt")
    assert found["data"] == [
        {"object": "document", "name": "new.txt", "status": "ready", "tokens": len(text(9)), "stored": stored}
    ]
    done: Any = fresh.client().completions.create(
        model="mine", prompt=text(9)[:30], max_tokens=20, extra_body={"passages": 50}
    )
    assert "new.txt" in {passage["document"] for passage in done.passages}


@pytest.mark.slow
def test_another_text_of_the_same_name_replaces_it_and_forgetting_takes_it_out(
    room: Room, own: Room, fresh: Running, tmp_path: Path
) -> None:
    for number in (9, 8):
        assert fresh.put("mine", "new.txt", text(number))[0] == 202
        fresh.until_read("mine")
    expected = by_commands(room, tmp_path / "second", ("new.txt", text(8)))
    assert answer(fresh) == alone(expected)
    assert contents(own.libraries["mine"].path) == contents(expected.libraries["mine"].path)
    assert fresh.forget("mine", "new.txt") == (200, {"object": "document", "name": "new.txt", "deleted": True})
    assert "new.txt" not in fresh.documents("mine")
    assert answer(fresh) == alone(room)
    # Of what `ingest` had read, too.
    assert fresh.forget("mine", "shelf/book1.txt")[0] == 200
    expected = by_commands(room, tmp_path / "third", ("shelf/book1.txt", None))
    assert answer(fresh) == alone(expected)
    assert fresh.forget("mine", "shelf/book1.txt")[1]["error"]["code"] == "document_not_found"


def test_a_text_that_is_known_is_not_read_again(fresh: Running) -> None:
    assert fresh.put("mine", "copy.txt", text(0))[0] == 202
    fresh.until_read("mine")
    _, found = fresh.call("GET", f"{PATH}?name=copy.txt")
    (copy,) = found["data"]
    assert (copy["status"], copy["same_as"]) == ("known", "shelf/book0.txt")
    assert fresh.number("fot_document_tokens_total") == 0
    # The same again under its own name changes nothing.
    assert fresh.put("mine", "shelf/book0.txt", text(0))[0] == 202
    fresh.until_read("mine")
    assert fresh.documents("mine")["shelf/book0.txt"] == "ready"
    assert fresh.forget("mine", "copy.txt")[0] == 200
    assert "copy.txt" not in fresh.documents("mine")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", "x" * 255, "ä 字.txt", "a?b=c&d", "00000001.json", "%2e"]
)
def test_names_are_labels(own: Room, fresh: Running, name: str) -> None:
    def files() -> set[Path]:
        kept = own.libraries["mine"].path
        return {path for path in own.folder.rglob("*") if kept not in path.parents}

    before = files()
    assert fresh.put("mine", name, text(7))[0] == 202
    fresh.until_read("mine")
    assert fresh.documents("mine")[name] == "ready"
    status, said = fresh.call("GET", f"/v1/memories/mine/text?name={quote(name, safe='')}&around=20")
    assert (status, said["after"]) == (200, text(7)[:20])
    assert fresh.forget("mine", name)[0] == 200
    assert files() == before


@pytest.mark.parametrize(
    "name", ["", "%20", "a%00b", "%ED%A0%80", "%FF", "x" * 256, "a%0Ab", "a%1B%5B2J", "a&nome=b", "%E2%80%AE"]
)
def test_what_is_no_name_is_told(fresh: Running, name: str) -> None:
    for method, body in (("PUT", b"word"), ("DELETE", None)):
        status, told = fresh.call(method, f"{PATH}?name={name}", body)
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")
        assert fresh.call(method, PATH, body)[0] == 400
    assert len(fresh.documents("mine")) == 3


def test_what_is_no_document_is_told_and_nothing_is_left_of_it(own: Room) -> None:
    with running(own, max_document_bytes=1000, max_document_tokens=500) as strict:
        for body, status, code in (
            (b"", 400, "not_text"),
            (b" \n ", 400, "not_text"),
            (b"\xff\xfe\xff", 400, "not_text"),
            (b"a\0b", 400, "not_text"),
            (b"\xed\xa0\x80", 400, "not_text"),
            (b"word " * 201, 413, "request_too_large"),
            (b"word " * 101, 413, "document_too_long"),
        ):
            found, told = strict.put("mine", "x.txt", body)
            assert (found, told["error"]["code"]) == (status, code)
        assert strict.put("nine", "x.txt", b"a")[0] == 404
        assert strict.put("model", "x.txt", b"a")[1]["error"]["code"] == "no_memory"
        assert len(strict.documents("mine")) == 3
        assert [path.name for path in (own.libraries["mine"].path / "inbox").iterdir()] == [".lock"]
        # UTF-16 is text too.
        assert strict.put("mine", "wide.txt", "\ufeffword5".encode("utf-16-le"))[1]["tokens"] == 5
        strict.until_read("mine")
    assert not (own.libraries["mine"].path / "inbox").exists()


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form of parts: what their ``Content-Disposition`` says, and what they hold."""
    said = [b"--x\r\nContent-Disposition: form-data" + head.encode() + b"\r\n\r\n" + body for head, body in parts]
    return b"\r\n".join([*said, b"--x--\r\n"])


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_a_form_of_curl_is_taken(fresh: Running, tmp_path: Path) -> None:
    book = tmp_path / "book ä.txt"
    book.write_text(text(9), encoding="utf-8")
    curl = ["curl", "-sS", "-F", f"file=@{book}", f"{fresh.address}{PATH}"]
    told = json.loads(subprocess.run(curl, capture_output=True, check=True, timeout=PATIENCE_S).stdout)
    assert (told["name"], told["tokens"]) == (book.name, len(text(9).encode()))


def test_forms_are_taken_as_browsers_send_them(fresh: Running) -> None:
    for head, path, name in (
        ('; name="file"; filename="../../etc/passwd"', PATH, "passwd"),
        ('; name="file"; filename="C:\\\\books\\\\one.txt"', PATH, "one.txt"),
        ('; name="file"; filename="x.txt"', f"{PATH}?name=given", "given"),
    ):
        status, told = fresh.call("POST", path, form((head, text(8).encode())), FORM)
        assert (status, told["name"]) == (202, name)
    body = form(('; name="file"; filename="x.txt"', text(7).encode()), ('; name="name"', "named 字".encode()))
    assert fresh.call("PUT", PATH, body, FORM)[1]["name"] == "named 字"
    fresh.until_read("mine")
    # Its text is the file's, and no more.
    _, said = fresh.call("GET", f"/v1/memories/mine/text?name={quote('named 字')}&stop=4000")
    assert said["text"] == text(7)


def test_what_is_no_form_with_one_document_is_told(own: Room) -> None:
    file, word = '; name="file"; filename="x.txt"', b"word5"
    with running(own, max_document_bytes=1000) as strict:
        for body, headers, status, code in (
            (form((file, b"word " * 201)), FORM, 413, "request_too_large"),
            (form((file, b"word " * 20000)), FORM, 413, "request_too_large"),
            (form((file, word), (file, word)), FORM, 400, "invalid_form"),
            (form(('; name="name"', word)), FORM, 400, "invalid_form"),
            (form((file, word), ('; name="name"', b"x" * 5000)), FORM, 400, "invalid_value"),
            (form((file, word), ('; name="name"', b"x" * 300)), FORM, 400, "invalid_value"),
            (form((file, word), ('; name="name"', b"\xff")), FORM, 400, "invalid_form"),
            (form((file, word), ('; name="path"', b"/etc")), FORM, 400, "unknown_parameter"),
            (form(("; name=\"file\"; filename*=UTF-8''x.txt", word)), FORM, 400, "invalid_form"),
            (form(('; name="file"; filename=""', word)), FORM, 400, "invalid_value"),
            (form(('; name="file"; filename="a\x1b[2J"', word)), FORM, 400, "invalid_value"),
            (form((file, b"")), FORM, 400, "not_text"),
            (form((file, word))[:-6], FORM, 400, "invalid_form"),
            (b"word5", FORM, 400, "invalid_form"),
            (b"", FORM, 400, "invalid_form"),
            (form((file + "; a=" + "b" * 9000, word)), FORM, 400, "invalid_form"),
            (form((file, word)), {"Content-Type": "multipart/form-data"}, 400, "invalid_form"),
            (form((file, word)), {"Content-Type": "multipart/mixed; boundary=x"}, 415, "unsupported_media_type"),
        ):
            found, told = strict.call("POST", PATH, body, headers)
            assert (found, told["error"]["code"]) == (status, code), body[:200]
        assert len(strict.documents("mine")) == 3
        assert [path.name for path in (own.libraries["mine"].path / "inbox").iterdir()] == [".lock"]


def test_an_upload_that_breaks_off_leaves_nothing(own: Room) -> None:
    inbox = own.libraries["mine"].path / "inbox"
    with running(own, max_documents_waiting=1) as small:
        host, _, port = urlsplit(small.address).netloc.partition(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), PATIENCE_S) as client:
                head = f"PUT {PATH}?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nword"
                client.sendall(head.encode())
                until(lambda: list(inbox.glob("*.part")))
                assert small.put("mine", "y", b"word")[1]["error"]["code"] == "queue_full"
            until(lambda: not list(inbox.glob("*.part")))
        until(lambda: small.put("mine", "y", b"word")[0] == 202)


def test_a_full_disk_is_told(own: Room, fresh: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("lightning_fot.library.inbox.sync", full)
        status, told = fresh.put("mine", "new.txt", text(9))
    assert (status, told["error"]["code"]) == (507, "not_kept")
    assert "No space left" in told["error"]["message"]
    assert [path.name for path in (own.libraries["mine"].path / "inbox").iterdir()] == [".lock"]
    assert fresh.put("mine", "new.txt", text(9))[0] == 202
    fresh.until_read("mine")
    assert fresh.documents("mine")["new.txt"] == "ready"


def test_what_cannot_be_read_is_told_and_the_next_one_is_read(own: Room, fresh: Running) -> None:
    path = own.libraries["mine"].path
    with Library.read(path).locked():
        for number, name in ((7, "a.txt"), (8, "b.txt")):
            assert fresh.put("mine", name, text(number))[0] == 202
        (path / "inbox" / "00000001.text").unlink()
    fresh.until_read("mine")
    assert {name: status for name, status in fresh.documents("mine").items() if name in ("a.txt", "b.txt")} == {
        "a.txt": "failed", "b.txt": "ready",
    }  # fmt: skip
    _, found = fresh.call("GET", f"{PATH}?name=a.txt")
    assert "cannot be read any more (1 unreadable)" in found["data"][0]["detail"]
    assert fresh.forget("mine", "a.txt")[0] == 200
    assert "a.txt" not in fresh.documents("mine")


def test_a_passage_is_read_at_its_place(room: Room, server: Running) -> None:
    said = text(0)
    path = "/v1/memories/mine/text?name=shelf%2Fbook0.txt"
    status, found = server.call("GET", f"{path}&start=50&stop=80&around=20")
    assert status == 200
    assert (found["before"], found["text"], found["after"]) == (said[30:50], said[50:80], said[80:100])
    assert (found["first"], found["start"], found["stop"], found["last"]) == (30, 50, 80, 100)
    assert found["tokens"] == len(said)
    # Beyond its end.
    _, found = server.call("GET", f"{path}&start=100000&stop=100001")
    assert (found["text"], found["before"]) == ("", said[-300:])
    for query, status in (
        ("start=-1", 400),
        ("start=x", 400),
        ("start=5&stop=4", 400),
        ("around=100000", 400),
        ("stop=1e3", 400),
        ("start=" + "9" * 5000, 400),
        ("place=3", 400),
    ):
        assert server.call("GET", f"{path}&{query}")[0] == status
    assert server.call("GET", "/v1/memories/mine/text?name=nine")[1]["error"]["code"] == "document_not_found"


def test_a_character_that_is_cut_goes_with_what_follows(fresh: Running) -> None:
    said = "aä字😀b"
    assert fresh.put("mine", "wide.txt", said)[0] == 202
    fresh.until_read("mine")
    for start in range(len(said.encode())):
        _, found = fresh.call("GET", f"/v1/memories/mine/text?name=wide.txt&start={start}&stop={start + 1}")
        assert found["before"] + found["text"] + found["after"] == said
