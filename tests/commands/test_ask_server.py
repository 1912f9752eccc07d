"""``lightning ask --url``: answers of a server are those of a local ask; what is not there is told by name."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.cli import main
from lightning_fot.library.library import Library
from lightning_fot.library.remote import Remote
from tests.support.memories import SETTINGS, backbone, books
from tests.support.patience import PATIENCE_S
from tests.support.serving import Room, Running, running

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
KEY = "long-secret"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    here = tmp_path_factory.mktemp("asked")
    books(here / "shelf", 2)
    backbone(here / "model", template=TEMPLATE)
    before = Path.cwd()
    os.chdir(here)
    try:
        assert main(["ingest", "mine", "shelf", *SETTINGS, "--model.backbone=model"]) == 0
    finally:
        os.chdir(before)
    from lightning_fot.training.opening import open_model

    library = Library.read(here / "memories" / "mine")
    return Room(here, *open_model(library.model), {"mine": library})


@pytest.fixture(scope="module")
def server(room: Room) -> Iterator[Running]:
    with running(room, max_tokens=10**6) as found:
        yield found


@pytest.fixture(scope="module")
def locked(room: Room) -> Iterator[Running]:
    """A server with a key and low limits."""
    with running(room, api_key=KEY, max_tokens=50, max_prompt_tokens=60) as found:
        yield found


@pytest.fixture(autouse=True)
def _here(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room.folder)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reported(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["ask", "mine", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["What is word5?", "--max_new_tokens=12"],
        ["What is word5?", "--max_new_tokens=12", "--raw"],
        ["word7", "--max_new_tokens=9", "--temperature=1.3", "--top_p=0.9", "--seed=7", "--passages=2"],
        ["What is word5?", "--max_new_tokens=12", "--quotes=1"],
        ["word7", "--max_new_tokens=9", "--top_p=0.9", "--seed=7", "--passages=0"],
    ],
)
def test_it_says_what_a_local_ask_says(words: list[str], server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    local = reported(capsys, *words)
    remote = reported(capsys, *words, f"--url={server.address}")
    differs = {"memory", "url", "seconds", "model", "passages"}
    assert {key: value for key, value in remote.items() if key not in differs} == {
        key: value for key, value in local.items() if key not in differs
    }
    assert (remote["memory"], remote["url"]) == ("mine", server.address)
    if local["passages"] is None:
        assert remote["passages"] is None
    else:
        assert remote["passages"]
        for shown, alone in zip(remote["passages"], local["passages"], strict=True):
            for key in ("share", "rank_share"):
                assert shown.pop(key) == pytest.approx(alone.pop(key), rel=1e-4)
            assert shown == alone


def test_it_is_shown_as_a_local_answer_is(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", "mine", "What is word5?", "--max_new_tokens=12"]
    assert main(words) == 0
    local = capsys.readouterr()
    for ending in ("", "/", "/v1", "/v1/"):
        assert main([*words, f"--url={server.address}{ending}"]) == 0
        remote = capsys.readouterr()
        assert remote.out == local.out
        assert "of 2 documents at" in remote.err
        assert "(Cut at --max_new_tokens.)" in remote.err
    # The bare model has no memory to count or to attend to.
    assert main(["ask", "model", "What?", "--max_new_tokens=2", f"--url={server.address}"]) == 0
    assert "It attended to no passage." in capsys.readouterr().out


def test_a_seed_is_drawn_and_told(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["word7", "--max_new_tokens=9", "--temperature=1.3", f"--url={server.address}"]
    first = reported(capsys, *words)
    assert reported(capsys, *words, f"--seed={first['seed']}")["text"] == first["text"]


def test_a_conversation_goes_on(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    for where in ([], [f"--url={server.address}"]):
        monkeypatch.setattr(sys, "stdin", Terminal("word5\nword7 word9\n\nNot asked.\n"))
        capsys.readouterr()
        assert main(["ask", "mine", "--max_new_tokens=6", "--passages=1", *where]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].count("Passages that the answer attended to") == 2
    assert shown[1] == shown[0]


def test_a_raw_conversation_is_one_text(server: Running) -> None:
    """The bytes of a random model's answer need not be text, so a local one, which keeps ids, may go on otherwise."""
    remote = Remote(server.address, "mine", max_new_tokens=6, raw=True)
    first, second = (remote.ask(question).text for question in ("word5", "word7 word9"))
    prompt = f"word5{first}\nword7 word9\n"
    done = server.client().completions.create(model="mine", prompt=prompt, max_tokens=6)
    assert done.choices[0].text == second


def run(words: list[str], folder: Path, repository: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    probe = (
        "import sys; from lightning_fot.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'starlette'} & set(sys.modules); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository), **options}
    return subprocess.run(
        [sys.executable, "-c", probe, "ask", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_nothing_is_loaded_and_no_memory_is_needed(locked: Running, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    words = ["mine", "word5", f"--url={locked.address}", "--api_key_file=key", "--max_new_tokens=5"]
    # A proxy is for other sites; this one would never answer.
    done = run(words, tmp_path, repository, http_proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "of the attention to the memory" in done.stdout
    assert not {path.name for path in tmp_path.iterdir()} - {"key"}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["ask", *words]) == 2
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    return said.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["mine", "x", "--url=localhost:8000"], ["url='localhost:8000'", "no address of a server", "http://"]),
        (["mine", "x", "--url=ftp://localhost"], ["no address of a server"]),
        (["mine", "x", "--url=http://"], ["no address of a server"]),
        (["mine", "x", "--url=http://a:99999"], ["no address of a server"]),
        (["mine", "x", "--url=http://me:word@localhost"], ["no address of a server"]),
        (["mine", "x", "--url=http://localhost/?a=b"], ["no address of a server"]),
        (["mine", "x", "--url=http://loc al"], ["no address of a server"]),
        (["mine", "x", "--url=http://localhost", "--api_key=ä"], ["api_key='…'", "printable ASCII"]),
        (["mine", "x", "--api_key=a"], ["api_key='…'", "Give --url"]),
        (["mine", "x", "--url=http://localhost", "--api_key=a", "--api_key_file=b"], ["api_key_file='b'"]),
        (["mine", "x", "--url=http://localhost", "--api_key_file=nowhere"], ["No such file"]),
        (["mine", "x", "--url=http://localhost", "--top_k_tokens=3"], ["top_k_tokens=3", "Leave it out"]),
        (["mine", "x", "--url=http://localhost", "--passage_tokens=3"], ["passage_tokens=3", "Leave it out"]),
        (["mine", "x", "--url=http://localhost", "--model.memory.top_k=3"], ["model.memory.top_k='3'"]),
        (["mine", "x", "--url=http://localhost", "--max_new_tokens=0"], ["max_new_tokens=0"]),
        (["mine", "--url=http://localhost"], ["question=None"]),
        (["mine", " ", "--url=http://localhost"], ["question=' ': is empty"]),
        (["mine", "x", "--url=http://nowhere.invalid"], ["cannot be reached", "lightning serve NAME"]),
    ],
)
def test_what_cannot_work_is_told(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(words, capsys)
    assert all(part in said for part in parts), said


def test_what_the_server_does_not_have_or_allow_is_told(
    server: Running, locked: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    at, key = f"--url={locked.address}", f"--api_key={KEY}"
    said = refused(["nine", "x", f"--url={server.address}"], capsys)
    assert f"MEMORY='nine': is not served by {server.address}. There are: mine, model." in said
    assert "api_key=None: is asked for by" in refused(["mine", "x", at], capsys)
    assert "api_key='…': is not that of" in refused(["mine", "x", at, f"--api_key={KEY[:-1]}"], capsys)
    said = refused(["mine", "x", at, key, "--max_new_tokens=51"], capsys)
    assert "max_new_tokens=51: " in said
    assert "from 1 to 50" in said
    said = refused(["mine", "x" * 100, at, key, "--max_new_tokens=5"], capsys)
    assert f"question='{'x' * 100}'" in said
    assert "this server reads 60 at most" in said
    assert "passages=51" in refused(["mine", "x", at, key, "--max_new_tokens=5", "--passages=51"], capsys)


@contextmanager
def says(*answers: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that serves one connection after the other, each in its way, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE_S)

        def serve() -> None:
            for answer in answers:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(PATIENCE_S)


def reply(*parts: bytes, status: bytes = b"200 OK") -> Callable[[socket.socket], None]:
    """What reads one request and sends these bytes."""

    def answer(connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = head.partition(b"\r\n\r\n")[2]
        while length and len(body) < int(length[0].split(b":")[1]):
            body += connection.recv(65536)
        connection.sendall(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\n\r\n" + b"".join(parts))

    return answer


def raw(content: bytes) -> Callable[[socket.socket], None]:
    """What sends these bytes, whatever it is asked."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(content)

    return answer


MODELS = json.dumps(
    {"data": [{"id": "mine", "owned_by": "lightning-fot", "memory": {"documents": 1, "tokens": 9}}]}
).encode()


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"<html>Hello</html>"),
        reply(b"<html>Not here</html>", status=b"404 Not Found"),
        reply(b"moved", status=b"302 Found\r\nLocation: http://elsewhere.example/"),
        reply(b'{"data": [{"id": "mine", "owned_by": "somebody"}]}'),
        reply(b"[1]"),
        reply(b'{"data": 3}'),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"),
    ],
)
def test_a_server_that_is_another_one_is_told(
    answer: Callable[[socket.socket], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with says(answer) as address:
        said = refused(["mine", "x", f"--url={address}"], capsys)
        assert f"url='{address}': is no server of `lightning serve`" in said


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    said = refused(["mine", "x", f"--url={address}"], capsys)
    assert f"url='{address}': cannot be reached (Connection refused). Start it, `lightning serve NAME`" in said


def event(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([event("Some"), event(" words")], "broke off before the answer was complete"),
        ([event("Some words"), event("", "stop")], "broke off before the answer was complete"),
        ([event("Some words"), b"data: [DONE]\n\n"], "broke off before the answer was complete"),
        ([event("Some words"), b"data: {\n\n"], "broke off (JSONDecodeError"),
        ([event("Some words"), b'data: {"error": {"message": "The model failed."}}\n\n'], "says: The model failed."),
        ([event("Some words"), b'data: {"choices": [{}]}\n\n'], "sends what is not known here"),
    ],
)
def test_an_answer_that_breaks_off_is_told_and_its_words_are_kept(
    parts: list[bytes], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with says(reply(MODELS), reply(*parts)) as address:
        assert main(["ask", "mine", "x", f"--url={address}"]) == 2
        said = capsys.readouterr()
        assert said.out == "Some words\n"
        assert f"url='{address}': {problem}" in said.err


def test_a_server_that_stops_is_told(room: Room, repository: Path) -> None:
    """A real one, in the middle of an answer that has no end, whose first words have come."""
    with running(room, grace=0.05, max_tokens=10**6) as stopping:
        words = [sys.executable, "-m", "lightning_fot", "ask", "mine", "word5", "--max_new_tokens=1000000"]
        with subprocess.Popen(
            [*words, f"--url={stopping.address}"], env={**os.environ, "PYTHONPATH": str(repository)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            first = os.read(process.stdout.fileno(), 1)
            stopping.server.stop()
            assert first + process.stdout.read()
            said = process.stderr.read().decode()
            assert process.wait(PATIENCE_S) == 2
        assert "says: The server has stopped before the answer was complete. Ask again." in said
        assert "Traceback" not in said


def test_a_full_server_is_told(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    with running(room, max_batch=1, max_queue=0, max_tokens=10**6) as small:
        with small.client().completions.create(model="mine", prompt="word5", max_tokens=10**6, stream=True) as first:
            next(iter(first))
            said = refused(["mine", "x", f"--url={small.address}"], capsys)
        assert "answers are waiting already" in said
        assert "Ask again in a while." in said
