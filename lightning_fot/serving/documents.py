"""Documents over HTTP: listed, uploaded, replaced, forgotten, and read at a place.

A name is a label: it stands in the query, and no file is named after it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightning_fot.data.text.parts import Skipped
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError
from lightning_fot.library.changes import digest_of
from lightning_fot.library.inbox import source_of
from lightning_fot.library.library import BusyError
from lightning_fot.serving.forms import BESIDE, Form, is_form
from lightning_fot.serving.guard import receive
from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.reading import Reading
from lightning_fot.serving.requests import ApiError
from lightning_fot.serving.settings import ServerSettings
from lightning_fot.serving.shelf import Job, Shelf, Shelves, Shown

_LONGEST_NAME = 255
_MOST_TOKENS = 4096
_AROUND = 300


class Documents:
    """What is in the memories of a server, and how it gets there.

    Args:
        shelves: The memories.
        settings: Limits.
        metrics: Counts.
    """

    def __init__(self, shelves: Shelves, settings: ServerSettings, metrics: Metrics) -> None:
        self._shelves = shelves
        self._settings = settings
        self._readings = {
            name: Reading(shelves.lm, shelves.tokenizer, shelf, metrics, settings.max_documents_waiting)
            for name, shelf in shelves.shelves.items()
            if shelf.library is not None
        }
        # Tokenizers are not made for threads: these belong to that of the checker.
        self._tokenizer: Any = copy.deepcopy(shelves.tokenizer)
        self._encoder = TextEncoder(self._tokenizer)
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="uploads")

    def start(self) -> None:
        """Begins to read what waits."""
        for reading in self._readings.values():
            reading.start()

    def stop(self) -> None:
        """Stops reading. Returns at once."""
        for reading in self._readings.values():
            reading.stop()

    def join(self) -> None:
        """Waits until what was read is saved."""
        self._checker.shutdown()
        for reading in self._readings.values():
            reading.join()

    def routes(self) -> list[Route]:
        """What is answered at which path."""
        path = "/v1/memories/{memory}"
        return [
            Route(f"{path}/documents", self._list, methods=["GET"]),
            Route(f"{path}/documents", self._put, methods=["PUT", "POST"]),
            Route(f"{path}/documents", self._delete, methods=["DELETE"]),
            Route(f"{path}/text", self._text, methods=["GET"]),
        ]

    def _shelf(self, request: Request) -> tuple[Shelf, Reading]:
        shelf = self._shelves.find(request.path_params["memory"])
        if shelf.name not in self._readings:
            raise ApiError(400, f"'{shelf.name}' is the model without a memory.", "memory", "no_memory")
        return shelf, self._readings[shelf.name]

    async def _list(self, request: Request) -> Response:
        shelf, reading = self._shelf(request)
        given = _query(request, {"name": None})
        name = None if given["name"] is None else _name(given["name"])
        # What waits first: what has become a document meanwhile is then there twice rather than not at all.
        jobs = [_described(job) for job in reading.jobs()]
        shown = [_shown(one) for one in shelf.documents]
        data = [one for one in [*shown, *jobs] if name is None or one["name"] == name]
        return JSONResponse({"object": "list", "data": data, "problem": reading.problem})

    async def _put(self, request: Request) -> Response:
        _, reading = self._shelf(request)
        given = _query(request, {"name": None})["name"]
        form = is_form(request.headers.get("content-type", ""))
        # The name of a file in a form comes with it; one that the address gives goes before.
        name = None if given is None and form else _name(given or "")
        reading.reserve()
        try:
            job = await self._taken(request, reading, name, form)
        except BusyError as error:
            raise ApiError(409, f"For this memory, {error.problem}. {error.fix}", code="memory_busy") from error
        except (SettingError, OSError) as error:
            raise ApiError(507, f"The document cannot be kept ({error}).", code="not_kept") from error
        finally:
            reading.release()
        return JSONResponse(_described(job), 202)

    async def _taken(self, request: Request, reading: Reading, name: str | None, form: bool) -> Job:
        loop = asyncio.get_running_loop()
        inbox = await loop.run_in_executor(self._checker, reading.open)
        with inbox.part() as part:
            with part.open("wb") as file:
                name = await self._received(request, name, form, file.write)
            return await loop.run_in_executor(self._checker, self._checked, reading, part, name)

    async def _received(self, request: Request, name: str | None, form: bool, take: Callable[[bytes], object]) -> str:
        """Hands on a document as it comes, and says its name."""
        most, timeout = self._settings.max_document_bytes, self._settings.timeout
        if not form:
            await receive(request, most, timeout, take)
            return name or ""
        read = Form(request.headers["content-type"], most, take)
        await receive(request, most + BESIDE, timeout, read.feed)
        if read.too_large:
            raise ApiError(413, f"The document is larger than {most:,} bytes.", code="request_too_large")
        return _name(read.name()) if name is None else name

    def _checked(self, reading: Reading, part: Path, name: str) -> Job:
        """Hands on an upload, once it is known to be a text of the right length."""
        skipped = Skipped()
        source = source_of(part, name, skipped)
        digest = None if source is None else digest_of(source, skipped)
        if source is None or digest is None:
            reasons = skipped.text()
            raise ApiError(400, f"The document is not text ({reasons}). Send UTF-8.", code="not_text")
        tokens, most = 0, self._settings.max_document_tokens
        for ids in self._encoder.stream(source.pieces()):
            tokens += len(ids)
            if tokens > most:
                raise ApiError(
                    413, f"The document has more than {most:,} tokens. Send it in parts, or raise "
                    "--max_document_tokens.", code="document_too_long",
                )  # fmt: skip
        if not tokens:
            raise ApiError(400, "The document has no tokens.", code="not_text")
        return reading.add(part, name, digest, tokens)

    async def _delete(self, request: Request) -> Response:
        shelf, reading = self._shelf(request)
        name = _name(_query(request, {"name": ""})["name"])
        loop = asyncio.get_running_loop()
        told = await loop.run_in_executor(None, reading.forget, name)
        if not await asyncio.wrap_future(told):
            raise _unknown(name, shelf)
        return JSONResponse({"object": "document", "name": name, "deleted": True})

    async def _text(self, request: Request) -> Response:
        shelf, _ = self._shelf(request)
        given = _query(request, {"name": "", "start": "0", "stop": None, "around": str(_AROUND)})
        name = _name(given["name"])
        start = _number("start", given["start"])
        stop = start if given["stop"] is None else _number("stop", given["stop"])
        around = _number("around", given["around"])
        if stop < start or max(around, stop - start) > _MOST_TOKENS:
            raise ApiError(400, f"'stop' must not be below 'start', and no stretch longer than {_MOST_TOKENS} tokens.",
                           "stop", "invalid_value")  # fmt: skip
        loop = asyncio.get_running_loop()
        said = await loop.run_in_executor(self._shelves.encoder, self._stretch, shelf, name, start, stop, around)
        return JSONResponse(said)

    def _stretch(self, shelf: Shelf, name: str, start: int, stop: int, around: int) -> dict[str, Any]:
        """What a document says at a place; called in the thread of the shelves' encoder."""
        log = shelf.memory.log
        found = log.find(name)
        if not found:
            raise _unknown(name, shelf)
        document = found[0]
        start, stop = (min(max(place, document.first), document.tokens) for place in (start, stop))
        first, last = max(document.first, start - around), min(document.tokens, stop + around)

        def said(to: int) -> str:
            ids = [token for token in log.tokens(document.number, first, to).tolist() if token >= 0]
            text: str = self._shelves.tokenizer.decode(ids, skip_special_tokens=True)
            return text

        whole = said(last)
        # A character may be cut: it goes with what follows.
        before, middle = (_common(said(place), whole) for place in (start, stop))
        return {
            "object": "text",
            "name": name,
            "tokens": document.tokens,
            "first": first,
            "start": start,
            "stop": stop,
            "last": last,
            "before": whole[:before],
            "text": whole[before:middle],
            "after": whole[middle:],
        }


def _common(text: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = zip(text, other, strict=False)
    return next((place for place, (one, two) in enumerate(pairs) if one != two), min(len(text), len(other)))


def _query(request: Request, known: Mapping[str, str | None]) -> dict[str, Any]:
    """Values of the query, by name; what is left out has the value that is given here.

    Raises:
        ApiError: It is no UTF-8, or holds something else.
    """
    try:
        pairs = parse_qsl(request.url.query, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError as error:
        raise ApiError(400, "The query is not UTF-8, percent-encoded.", code="invalid_value") from error
    for name, _ in pairs:
        if name not in known:
            raise ApiError(
                400, f"'{name[:100]}' is not known here; known are {', '.join(known)}.", name[:100], "unknown_parameter"
            )
    return {**known, **dict(pairs)}


def _name(name: str) -> str:
    """A document's name.

    Raises:
        ApiError: It cannot be one.
    """
    problem = None
    if not name.strip():
        problem = "is missing: say ?name=… in the address, or send a form with a file that has one"
    elif len(name) > _LONGEST_NAME:
        problem = f"has {len(name):,} characters; {_LONGEST_NAME} are allowed"
    elif not name.isprintable():
        problem = "holds characters that cannot be printed"
    if problem is not None:
        raise ApiError(400, f"'name' {problem}.", "name", "invalid_value")
    return name


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ApiError(400, f"'{name}' must be a whole number from 0, not '{text[:100]}'.", name, "invalid_type")
    return int(text)


def _unknown(name: str, shelf: Shelf) -> ApiError:
    return ApiError(404, f"There is no document '{name[:100]}' in '{shelf.name}'.", "name", "document_not_found")


def _shown(one: Shown) -> dict[str, Any]:
    status = "ready" if one.done else "incomplete"
    return {"object": "document", "name": one.name, "status": status, "tokens": one.tokens, "stored": one.stored}


def _described(job: Job) -> dict[str, Any]:
    handed = job.handed
    about = {"object": "document", "name": handed.name, "status": job.state, "tokens": handed.tokens, "read": job.read}
    if job.state == "known":
        return {**about, "same_as": job.detail}
    return about if job.detail is None else {**about, "detail": job.detail}
