"""The routes of a server.

On Starlette and Uvicorn, which LitServe is made of too, and not on LitServe: its ``OpenAISpec`` (0.2.19) serves one
model by ``/v1/chat/completions`` alone, drops ``seed``, leaves ``stop`` to others, calls each end ``stop``, and has no
place for passages; errors have FastAPI's form; its workers are processes, so that a memory could not be read into while
it is asked; and an answer goes on when its client has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lightning_fot.serving.answers import Answers
from lightning_fot.serving.documents import Documents
from lightning_fot.serving.engine import Engine
from lightning_fot.serving.guard import Crowd, Guard, read_body
from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.requests import ApiError, read_asked
from lightning_fot.serving.settings import ServerSettings
from lightning_fot.serving.shelf import Shelf, Shelves
from lightning_fot.serving.web.page import page_routes


class Routes:
    """What is answered at which path.

    Args:
        shelves: The memories.
        engine: Generates answers.
        settings: Limits.
        metrics: Counts.
    """

    def __init__(self, shelves: Shelves, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self._shelves = shelves
        self._engine = engine
        self._settings = settings
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._numbers, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]

    async def _health(self, request: Request) -> Response:
        if not self._engine.alive:
            raise ApiError(503, "The server is stopping.", code="stopping")
        return JSONResponse({"status": "ok"})

    async def _numbers(self, request: Request) -> Response:
        for shelf in self._shelves.shelves.values():
            memory = shelf.memory
            self._metrics.set("fot_memory_bytes", memory.nbytes, memory=shelf.name)
            self._metrics.set("fot_memory_tokens", len(memory), memory=shelf.name)
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(one) for one in self._shelves.shelves.values()]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_described(self._shelves.find(request.path_params["model"])))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        settings = self._settings
        body = await read_body(request, settings.max_body_bytes, settings.timeout)
        asked = read_asked(body, chat, settings)
        answers = Answers(asked, self._shelves, self._engine)
        await answers.begin(settings.max_prompt_tokens)
        if asked.stream:
            return _Stream(answers)
        try:
            whole = asyncio.ensure_future(answers.whole())
            gone = asyncio.ensure_future(_gone(request))
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                # Nobody is there to hear it.
                return Response(status_code=499)
            return JSONResponse(whole.result())
        finally:
            answers.cancel()
            for task in (whole, gone):
                task.cancel()


class _Stream(StreamingResponse):
    """Server-sent events, which stop where the client goes away."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        super().__init__(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        async for event in self._answers.stream():
            yield event

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Not in the generator: one that was never begun has no end either.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _gone(request: Request) -> None:
    """Waits until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _described(shelf: Shelf) -> dict[str, Any]:
    memory = shelf.memory
    return {
        "id": shelf.name,
        "object": "model",
        "created": 0,
        "owned_by": "lightning-fot",
        "memory": None if shelf.library is None else {"documents": len(memory.documents), "tokens": len(memory)},
    }


def make_app(shelves: Shelves, engine: Engine, documents: Documents, settings: ServerSettings, metrics: Metrics) -> Any:
    """The application, to be run by Uvicorn.

    Args:
        shelves: The memories.
        engine: Started.
        documents: What reads into the memories.
        settings: Key and limits.
        metrics: Counts.
    """
    app = Starlette(
        routes=[*Routes(shelves, engine, settings, metrics).routes(), *documents.routes(), *page_routes()],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},
    )
    return Guard(Crowd(app, settings.max_connections), settings, metrics)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    # What was not read of a request must not be taken for the next one.
    headers = {"connection": "close"} if error.status in (408, 413) else {}
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "There is nothing at this path.", 405: "This path takes another method."}
    told = ApiError(error.status_code, said.get(error.status_code, error.detail), code="not_found")
    return JSONResponse(told.body(), error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "The server failed.", code="internal_error").body(), 500)
