"""A server in a thread of the test process, with real sockets, and what its answers must be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import torch

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

    def text(self, ids: list[int]) -> str:
        """What they say."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass
class Running:
    """A server that runs."""

    address: str
    server: Server

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client of it."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

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
