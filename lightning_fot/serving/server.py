"""Runs a server until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lightning_fot.errors import SettingError
from lightning_fot.serving.app import make_app
from lightning_fot.serving.documents import Documents
from lightning_fot.serving.engine import Engine
from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.settings import ServerSettings
from lightning_fot.serving.shelf import Shelves

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.library.library import Library
    from lightning_fot.model.lm import MemoryLM

# Uvicorn cuts connections this long after the engine has told its last clients.
_AFTER_GRACE_S = 5
_BACKLOG = 2048


class Server:
    """Serves memories until a signal comes, or :meth:`stop`; then finishes the answers in flight.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        libraries: By the name that clients use.
        settings: Address, key, limits.

    Raises:
        SettingError: The address cannot be listened at, or a memory cannot be loaded.
    """

    def __init__(
        self,
        lm: MemoryLM,
        tokenizer: PreTrainedTokenizerBase,
        libraries: Mapping[str, Library],
        settings: ServerSettings,
    ) -> None:
        self._settings = settings
        self._listening = _listen(settings)
        self.metrics = Metrics()
        """Counts."""
        try:
            self._shelves = Shelves(lm, tokenizer, libraries)
        except BaseException:
            self._listening.close()
            raise
        self._engine = Engine(lm, tokenizer, settings.max_batch, settings.max_queue, self.metrics)
        self._documents = Documents(self._shelves, settings, self.metrics)
        app = make_app(self._shelves, self._engine, self._documents, settings, self.metrics)
        self._uvicorn = _Uvicorn(app, settings, self._engine, self._documents)

    def run(self, ready: Callable[[str], None]) -> None:
        """Serves; signals are heard in the main thread alone.

        Args:
            ready: Told the address once clients can come.
        """
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        self._uvicorn.when_ready = lambda: ready(f"http://{host}:{self._listening.getsockname()[1]}")
        self._engine.start()
        self._documents.start()
        try:
            self._uvicorn.run(sockets=[self._listening])
        finally:
            self._listening.close()
            self._documents.stop()
            self._engine.stop(0)
            self._engine.join()
            self._documents.join()
            self._shelves.encoder.shutdown()

    def stop(self) -> None:
        """What the first signal does."""
        self._uvicorn.handle_exit(signal.SIGTERM, None)


def _listen(settings: ServerSettings) -> socket.socket:
    """The socket; clients that come before all is ready wait."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise SettingError(
            "port", settings.port, f"cannot be listened at on {settings.host} ({error.strerror})", "Choose another."
        ) from error
    return listening


class _Uvicorn(uvicorn.Server):
    """Uvicorn, which tells the engine to come to an end when it is told itself."""

    def __init__(self, app: Any, settings: ServerSettings, engine: Engine, documents: Documents) -> None:
        config = uvicorn.Config(
            app,
            http=_protocol(settings),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.grace) + _AFTER_GRACE_S,
        )
        super().__init__(config)
        self.when_ready: Callable[[], None] = lambda: None
        self._engine = engine
        self._documents = documents
        self._grace = settings.grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self.when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first lets answers finish, another one does not. What is read stops at the next window."""
        self._documents.stop()
        self._engine.stop(0 if self.should_exit else self._grace)
        super().handle_exit(sig, frame)


def _protocol(settings: ServerSettings) -> type[H11Protocol]:
    """HTTP in which connections that ask for nothing keep nobody out.

    Uvicorn's own waits for ever for the first request of a connection, and counts connections that say nothing among
    those that it serves. Here they are closed after a time, and sooner where there would be too many: the one that has
    been there longest first.
    """
    there: dict[H11Protocol, None] = {}

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(settings.timeout, self._end_if_silent)
            if len(there) >= settings.max_connections:
                idle = next((one for one in there if _idle(one)), None)
                if idle is not None:
                    del there[idle]
                    idle.transport.close()
            there[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            there.pop(self, None)
            super().connection_lost(exc)

        def _end_if_silent(self) -> None:
            # Uvicorn's types leave out that there is none before the first request.
            cycle: Any = self.cycle
            if cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Impatient


def _idle(connection: Any) -> bool:
    """Whether no request of a connection is under way."""
    return connection.cycle is None or bool(connection.cycle.response_complete)
