"""Who may ask, and how much: looked at before a request reaches what answers it."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.requests import ApiError
from lightning_fot.serving.settings import LOOPBACK, ServerSettings
from lightning_fot.serving.web.page import PATHS

# They hold nothing of a memory: the page asks for the key itself.
_OPEN = (*PATHS, "/health")
# Bytes of a request that is too large which are read and thrown away: clients listen once they have said all.
_DRAINED = 64 * 2**20
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Refuses whoever has no key, and pages of other sites; counts responses.

    A server without a key can be reached from this machine alone, but so can it by any page that its user's browser
    shows. So it answers only to names of this machine, and to no other page.

    Args:
        app: What answers.
        settings: The key, and the address.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app = app
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._hosts = {*LOOPBACK, settings.host}
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
                route = scope.get("route")
                path = "other" if route is None else str(route.path)
                self._metrics.add("fot_http_responses_total", 1, route=path, status=str(message["status"]))
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await _refuse(error, sent)
            return
        await self._app(scope, receive, sent)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            raise ApiError(403, "Pages of other sites may not ask this server.", code="foreign_origin")
        if self._key is None:
            if _name(host) not in self._hosts:
                raise ApiError(403, f"This server is not called {host[:100]!r}; without an API key it answers to "
                               "127.0.0.1 and localhost alone.", code="foreign_host")  # fmt: skip
        elif scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            # In constant time: how long it takes must not tell how much of the key was right.
            if not hmac.compare_digest(key.strip(), self._key) or kind.lower() != b"bearer":
                raise ApiError(401, "Give the API key as 'Authorization: Bearer KEY'.", code="invalid_api_key")


class Crowd:
    """Refuses requests while so many others are under way.

    Args:
        app: What answers.
        most: Requests at once.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._there = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if self._there >= self._most:
            error = ApiError(503, f"{self._there:,} requests are under way. Try again later.", code="overloaded")
            await _refuse(error, send)
            return
        self._there += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._there -= 1


def _name(host: str) -> str:
    """The host of ``Host``, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Request, most: int, timeout: float) -> bytes:
    """The body of a request; see :func:`receive`."""
    parts: list[bytes] = []
    await receive(request, most, timeout, parts.append)
    return b"".join(parts)


async def receive(request: Request, most: int, timeout: float, take: Callable[[bytes], object]) -> None:
    """Hands on the body of a request as it comes.

    Args:
        request: Whose.
        most: Bytes that it may have.
        timeout: Seconds that it may take.
        take: Gets its parts.

    Raises:
        ApiError: It is too large, too slow, or breaks off.
    """
    size = 0
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    take(part)
                elif size > most + _DRAINED:
                    break
    except TimeoutError:
        raise ApiError(408, f"The request was not complete after {timeout:g} seconds.", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The request broke off.", code="incomplete") from None
    if size > most:
        raise ApiError(413, f"The request is larger than {most:,} bytes.", code="request_too_large")
