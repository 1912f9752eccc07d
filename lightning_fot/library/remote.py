"""Asks a server that ``lightning serve`` runs. Standard library only: no model is loaded to ask."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from lightning_fot.errors import SettingError
from lightning_fot.library.answer import Answer, AttendedPassage
from lightning_fot.request.api_key import check_key

# Seconds in which a server has to say who it is. An answer may take as long as it takes.
_PATIENCE_S = 30.0
# Bytes of a list of memories or a refusal, and of one event of a stream.
_MOST = 2**24
# What the server calls these options.
_OPTIONS = {"max_tokens": "max_new_tokens", "messages": "question", "prompt": "question"}


class Remote:
    """Asks a memory of a server, each question with the conversation before it.

    It does not go through proxies and follows no redirects: the key is sent to the address that was given alone.

    Args:
        url: The server, such as ``http://127.0.0.1:8000``; a ``/v1`` at its end is left out.
        memory: Its name there.
        max_new_tokens: Longest answer.
        temperature: Of sampling; None means 1.
        top_p: Sample among the likeliest tokens of this joint probability; None means all.
        seed: Of sampling; None draws one for each answer.
        passages: Passages wanted.
        quotes: Passages read once more before the question; None leaves it to the server's model.
        raw: Continue the question as it is, even where the server's model has a chat template.
        key: The server's API key; None without.

    Raises:
        SettingError: The address or the key is none.
    """

    def __init__(
        self,
        url: str,
        memory: str,
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        passages: int = 5,
        quotes: int | None = None,
        raw: bool = False,
        key: str | None = None,
    ) -> None:
        check_key(key)
        self.url = url
        self.memory = memory
        self._address = urlsplit(_checked(url))
        self._base = self._address.path.rstrip("/").removesuffix("/v1").rstrip("/")
        self._key = key
        self._raw = raw
        self._seed = seed
        self._fields: dict[str, Any] = {"max_tokens": max_new_tokens, "passages": passages}
        if quotes is not None:
            self._fields["quotes"] = quotes
        if temperature is not None or top_p is not None:
            self._fields |= {"temperature": 1.0 if temperature is None else temperature, "top_p": top_p}
        self._messages: list[dict[str, str]] = []

    def look(self) -> dict[str, int] | None:
        """Asks the server what it has, before anything else.

        Returns:
            ``documents`` and ``tokens`` of the memory; None of the model without one.

        Raises:
            SettingError: There is no such server, memory or key.
        """
        with self._said("GET", "/v1/models", None, _PATIENCE_S) as response:
            content = _read(response)
        if response.status != 200 and "error" in content:
            raise self._refusal(response.status, content["error"], "")
        try:
            models = {one["id"]: one["memory"] for one in content["data"] if one["owned_by"] == "lightning-fot"}
        except (LookupError, TypeError):
            models = {}
        if not models:
            raise self._error(
                f"is no server of `lightning serve` (GET {self._base}/v1/models: {response.status} {response.reason})",
                "Give the address that it said when it was started.",
            )
        if self.memory not in models:
            raise SettingError(
                "MEMORY", self.memory, f"is not served by {self.url}", f"There are: {', '.join(models)}."
            )
        found: dict[str, int] | None = models[self.memory]
        return found

    def ask(self, question: str, write: Callable[[str], None] = lambda text: None) -> Answer:
        """Asks.

        Args:
            question: Not empty.
            write: Gets the text of the answer in pieces, as it comes.

        Raises:
            SettingError: The server cannot be reached, refuses, or breaks off.
        """
        began = time.monotonic()
        messages = [*self._messages, {"role": "user", "content": question}]
        seed = None
        if "temperature" in self._fields:
            seed = random.SystemRandom().randrange(2**32) if self._seed is None else self._seed
        texts: list[str] = []
        reason, usage, passages = "", dict[str, int](), list[AttendedPassage]()
        for event in self._events(messages, seed):
            try:
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text = choice["text"] if self._raw else choice["delta"].get("content")
                    if text:
                        texts.append(text)
                        write(text)
                    reason = choice["finish_reason"] or reason
                passages += [_passage(one) for one in event.get("passages", [])]
            except (LookupError, TypeError, AttributeError) as error:
                raise self._error(f"sends what is not known here ({error!r})", "Is its version this one's?") from error
        if not reason:
            raise self._error("broke off before the answer was complete", "Ask again.")
        answer = "".join(texts)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return Answer(
            question,
            answer,
            reason == "stop",
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
            time.monotonic() - began,
            seed,
            passages if self._fields["passages"] else None,
        )

    def _events(self, messages: list[dict[str, str]], seed: int | None) -> Iterator[dict[str, Any]]:
        """What comes of a question, piece by piece, to the end of the answer."""
        body = {"model": self.memory, "stream": True, "stream_options": {"include_usage": True}, **self._fields}
        if self._raw:
            # As a local conversation goes on without a template: a line for each question, answers as they are.
            first, *rest = messages
            body["prompt"] = first["content"] + "".join(
                f"\n{one['content']}\n" if one["role"] == "user" else one["content"] for one in rest
            )
        else:
            body["messages"] = messages
        path = "/v1/completions" if self._raw else "/v1/chat/completions"
        with self._said("POST", path, {**body, "seed": seed}, None) as response:
            if response.status != 200:
                error = _read(response).get("error")
                raise self._refusal(response.status, error, messages[-1]["content"])
            while line := response.readline(_MOST):
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise self._error(f"says: {str(event['error']['message']).rstrip('.')}", "Ask again.")
                    yield event
        raise self._error("broke off before the answer was complete", "Ask again.")

    @contextmanager
    def _said(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None
    ) -> Iterator[HTTPResponse]:
        """What the server says to a request."""
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(str(self._address.hostname), self._address.port, timeout=_PATIENCE_S)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:
            connection.close()
            raise self._error(
                f"cannot be reached ({getattr(error, 'strerror', None) or error})",
                "Start it, `lightning serve NAME`, or correct the address.",
            ) from error
        try:
            connection.sock.settimeout(timeout)
            # A machine that has gone without a word is noticed.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            headers = {"Content-Type": "application/json"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, self._base + path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()
        except SettingError:
            raise
        except TimeoutError as error:
            raise self._error(f"says nothing for {_PATIENCE_S:g} seconds", "Is it a server of ours?") from error
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            if body is None:
                raise self._error(f"is no server of `lightning serve` ({said})", "Correct the address.") from error
            raise self._error(f"broke off ({said})", "Ask again.") from error
        finally:
            connection.close()

    def _refusal(self, status: int, error: object, question: str) -> SettingError:
        """What the server will not do, in the words of the command line."""
        error = error if isinstance(error, dict) else {}
        if status == 401:
            if self._key is None:
                return SettingError("api_key", None, f"is asked for by {self.url}", "Give --api_key_file.")
            return SettingError("api_key", "…", f"is not that of {self.url}", "Correct it.")
        said = f"says: {str(error.get('message', status)).rstrip('.')}"
        if status in (429, 503):
            return self._error(said, "Ask again in a while.")
        field = str(error.get("param"))
        if field in self._fields or field in _OPTIONS:
            value = self._fields.get(field, question)
            return SettingError(_OPTIONS.get(field, field), value, f"{self.url} {said}", "Correct it.")
        return self._error(said, "Correct it.")

    def _error(self, problem: str, fix: str) -> SettingError:
        return SettingError("url", self.url, problem, fix)


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        fits = fits and not (parts.query or parts.fragment or "@" in parts.netloc)
    except ValueError:
        fits = False
    if not fits or not (url.isascii() and url.isprintable() and " " not in url):
        raise SettingError("url", url, "is no address of a server", "Write it as http://127.0.0.1:8000.")
    return url


def _read(response: HTTPResponse) -> dict[str, Any]:
    """A JSON object; an empty one where it is none."""
    try:
        content = json.loads(response.read(_MOST))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _passage(one: Mapping[str, Any]) -> AttendedPassage:
    return AttendedPassage(**{name: one[name] for name in AttendedPassage.__dataclass_fields__})
