"""More clients than a server takes, thousands of connections and requests: answered, and nothing is kept of them."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from sys import executable
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.support.markdown_blocks import ROOT
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.serving import Room, running

ASKED = {"model": "mine", "prompt": "word5 word7", "max_tokens": 5}


@dataclass
class Process:
    """A server in a process of its own."""

    process: Popen[str]
    address: str

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.address)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def files(self) -> int:
        """Open files, sockets among them."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Its threads."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def bytes(self) -> int:
        """Memory that is its own, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    def post(self, body: bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
        """Status and body of a request by a connection of its own."""
        connection = HTTPConnection(*self.place, timeout=PATIENCE_S)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@contextmanager
def serving(room: Room, *options: str) -> Iterator[Process]:
    """``lightning serve`` of the room's memories; it must end as a signal ends it."""
    words = [executable, "-m", "lightning_fot", "serve", "mine", "other", "--port=0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Popen(words, cwd=room.folder, env=environment, stderr=PIPE, stdout=DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if line.startswith("Serving"))
            address = next(word for word in ready.replace(";", " ").split() if word.startswith("http://"))
            yield Process(process, address)
            process.terminate()
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 143
        finally:
            process.kill()


def test_requests_beyond_the_limit_are_told_so_in_openais_form(room: Room) -> None:
    with running(room, max_connections=2, max_tokens=10**6) as small, ExitStack() as open_ones:
        streams = []
        for _ in range(2):
            stream = small.client().completions.create(model="mine", prompt="b", max_tokens=10**6, stream=True)
            streams.append(open_ones.enter_context(stream))
            next(iter(streams[-1]))
        with pytest.raises(openai.InternalServerError) as refused:
            small.client().models.list()
        assert refused.value.status_code == 503
        assert (refused.value.code, refused.value.type) == ("overloaded", "server_error")
        assert refused.value.response.headers["retry-after"] == "1"
        streams[0].close()
        # The server notices in its own time that a client has gone.
        while small.number("fot_requests_running") > 1:
            threading.Event().wait(0.01)
        assert small.client().models.list().data
        assert any('status="503"' in line for line in small.server.metrics.text().splitlines())


def test_connections_that_say_nothing_give_way(room: Room) -> None:
    with running(room, max_connections=5) as small:
        host, port = urlsplit(small.address).hostname, urlsplit(small.address).port
        assert host is not None
        silent = [socket.create_connection((host, port or 0), PATIENCE_S) for _ in range(20)]
        assert small.client().models.list().data
        # The first of them have been closed; the last ones may still ask.
        assert silent[0].recv(100) == b""
        silent[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 200")
        for one in silent:
            one.close()


@pytest.mark.slow
def test_a_thousand_silent_connections_keep_nobody_out(room: Room) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1500:
        pytest.skip("so many files may not be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    try:
        with serving(room, f"--timeout={PATIENCE_S}") as server, ExitStack() as at_end:
            expected = server.post(json.dumps(ASKED).encode())
            assert expected[0] == 200
            before = server.files()
            silent = [at_end.enter_context(socket.create_connection(server.place, PATIENCE_S)) for _ in range(1000)]
            text = json.loads(expected[1])["choices"][0]["text"]
            for _ in range(3):
                status, body = server.post(json.dumps(ASKED).encode())
                assert (status, json.loads(body)["choices"][0]["text"]) == (200, text)
            assert server.files() < before + 600
            for one in silent:
                one.close()
            wait_until(lambda: server.files() <= before, server.process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _good(server: Process, draw: random.Random) -> None:
    body = {**ASKED, "model": draw.choice(["mine", "other"]), "n": draw.choice([1, 2]), "seed": 3, "temperature": 1.0}
    assert server.post(json.dumps({**body, "max_tokens": draw.randrange(1, 9)}).encode())[0] == 200


def _chat(server: Process, draw: random.Random) -> None:
    question = " ".join(f"word{draw.randrange(97)}" for _ in range(draw.randrange(1, 30)))
    body = {"model": "mine", "messages": [{"role": "user", "content": question}], "max_tokens": 6, "stream": True}
    status, said = server.post(json.dumps(body).encode(), "/v1/chat/completions")
    assert status == 200
    assert said.endswith(b"data: [DONE]\n\n")


def _gone(server: Process, draw: random.Random) -> None:
    """A client that goes away in mid-stream."""
    connection = HTTPConnection(*server.place, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", json.dumps({**ASKED, "max_tokens": 500, "stream": True}).encode())
    connection.getresponse().readline()
    connection.close()


def _wrong(server: Process, draw: random.Random) -> None:
    body, status = draw.choice(
        [
            (b"{", 400),
            (b"", 400),
            (json.dumps({**ASKED, "model": "nine"}).encode(), 404),
            (json.dumps({**ASKED, "prompt": ""}).encode(), 400),
            (json.dumps({**ASKED, "prompt": "x" * 30_000}).encode(), 400),
        ]
    )
    found, said = server.post(body)
    assert found == status
    assert json.loads(said)["error"]["message"]


def _large(server: Process, draw: random.Random) -> None:
    status, said = server.post(json.dumps({**ASKED, "prompt": "x" * 10**7}).encode())
    assert (status, json.loads(said)["error"]["code"]) == (413, "request_too_large")


def _broken(server: Process, draw: random.Random) -> None:
    """One that goes away before it has said all."""
    with socket.create_connection(server.place, PATIENCE_S) as one:
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"[: draw.randrange(80)]
        )


MIXED: list[Callable[[Process, random.Random], Any]] = [_good] * 4 + [_chat] * 4 + [_gone, _wrong, _wrong, _broken]


@pytest.mark.robustness_long
def test_memory_stays_flat_over_thousands_of_mixed_requests(room: Room) -> None:
    with serving(room, "--max_queue=1000") as server:

        def ask(number: int) -> None:
            draw = random.Random(number)
            (_large if number % 200 == 0 else draw.choice(MIXED))(server, draw)

        seen: list[int] = []
        files = threads = 0
        with ThreadPoolExecutor(6) as pool:
            for part in range(10):
                list(pool.map(ask, range(300 * part, 300 * (part + 1))))
                # What is under way is over once the memory is looked at.
                assert server.post(json.dumps(ASKED).encode())[0] == 200
                seen.append(server.bytes())
                if part == 1:
                    files, threads = server.files(), server.threads()
                print(f"{300 * (part + 1)} requests: {seen[-1] / 2**20:.1f} MiB", flush=True)
        # The first parts fill caches and the allocator's pools.
        assert max(seen[5:]) < seen[2] + 2**23
        wait_until(lambda: server.files() <= files + 2 and server.threads() <= threads + 1, server.process)
