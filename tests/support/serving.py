"""A server in a thread of the test process, with real sockets, and what its answers must be."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlencode, urlsplit

import openai
import torch

from lightning_fot.cli import main
from lightning_fot.library.library import Library
from lightning_fot.serving.server import Server
from lightning_fot.serving.settings import ServerSettings
from tests.support.patience import PATIENCE_S

EOS = 1


@dataclass
class Room:
    """Memories on disk, and the model that reads them."""

    folder: Path
    lm: Any
    tokenizer: Any
    libraries: dict[str, Library]

    def memory(self, name: str) -> Any:
        """As a reader of its own sees it."""
        return self.libraries[name].load(self.lm) if name in self.libraries else self.lm.new_memory(1)

    def alone(self, name: str, prompt: str | list[int], count: int, **options: Any) -> Any:
        """Ids of the continuation by a direct call, and what noted its attention."""
        ids = [byte + 3 for byte in prompt.encode()] if isinstance(prompt, str) else prompt
        with self.lm.record_attention() as trace:
            out = self.lm.generate(
                torch.tensor([ids]), self.memory(name), max_new_tokens=count, eos_token_id=EOS, pad_token_id=EOS,
                **{"do_sample": False, **options},
            )  # fmt: skip
        return out[0, len(ids) :].tolist(), trace

    def copied(self, folder: Path) -> Room:
        """The same memories in another folder, to be changed."""
        shutil.copytree(self.folder / "memories", folder / "memories", ignore=shutil.ignore_patterns("inbox"))
        libraries = {name: Library.read(folder / "memories" / name) for name in self.libraries}
        return replace(self, folder=folder, libraries=libraries)

    def seen_by_another(self) -> Room:
        """The same memories, as another process sees them."""
        return replace(self, libraries={name: Library.read(one.path) for name, one in self.libraries.items()})

    def text(self, ids: list[int]) -> str:
        """What they say."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "it takes for ever"
        time.sleep(0.02)


@dataclass
class Running:
    """A server that runs."""

    address: str
    server: Server

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client of it."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a request made by hand."""
        connection = HTTPConnection(urlsplit(self.address).netloc, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def put(self, memory: str, name: str, text: str | bytes) -> tuple[int, Any]:
        """Uploads a document."""
        body = text if isinstance(text, bytes) else text.encode()
        return self.call("PUT", f"/v1/memories/{memory}/documents?{urlencode({'name': name})}", body)

    def forget(self, memory: str, name: str) -> tuple[int, Any]:
        """Forgets a document."""
        return self.call("DELETE", f"/v1/memories/{memory}/documents?{urlencode({'name': name})}")

    def documents(self, memory: str) -> dict[str, str]:
        """Status of each document; of two with one name, that of the later."""
        status, content = self.call("GET", f"/v1/memories/{memory}/documents")
        assert status == 200, content
        return {one["name"]: one["status"] for one in content["data"]}

    def until_read(self, memory: str) -> None:
        """Waits until nothing waits any more."""
        until(lambda: not {"waiting", "reading"} & set(self.documents(memory).values()))

    def number(self, name: str) -> float:
        """One of its metrics."""
        lines = self.server.metrics.text().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split(" ")[0].split("{")[0] == name)


@contextmanager
def running(room: Room, **changes: Any) -> Iterator[Running]:
    """A server on a free port, which is stopped at the end."""
    settings = replace(ServerSettings(port=0, timeout=PATIENCE_S, grace=PATIENCE_S), **changes)
    server = Server(room.lm, room.tokenizer, room.libraries, settings)
    told: Queue[str] = Queue()
    thread = threading.Thread(target=server.run, args=(told.put,), daemon=True)
    thread.start()
    try:
        yield Running(told.get(timeout=PATIENCE_S), server)
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def by_commands(room: Room, folder: Path, *changes: tuple[str, str | None]) -> Room:
    """A copy of the memories in which the commands have made changes: a name and its text, or None to forget it."""
    folder.mkdir()
    other = room.copied(folder)
    for name, said in changes:
        words = ["forget", str(folder / "memories" / "mine"), name]
        if said is not None:
            (folder / name).write_text(said, encoding="utf-8")
            words = ["ingest", *words[1:2], str(folder / name)]
        assert main(words) == 0
    other.libraries["mine"] = Library.read(folder / "memories" / "mine")
    return other


def answer(running: Running, prompt: str = "word5", count: int = 20) -> str:
    return running.client().completions.create(model="mine", prompt=prompt, max_tokens=count).choices[0].text


def alone(room: Room, prompt: str = "word5", count: int = 20) -> str:
    return room.text(room.alone("mine", prompt, count)[0])
