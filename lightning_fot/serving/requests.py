"""What clients ask for, in the form of OpenAI's interface: read, checked, and refused in its form too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_fot.serving.settings import ServerSettings

_MOST_STOPS = 4
_MOST_CHOICES = 16
_COLDEST = 0.001
_ROLES = ("system", "developer", "user", "assistant")


class ApiError(Exception):
    """An answer that refuses a request.

    Args:
        status: HTTP status.
        message: What is wrong, and what to do.
        param: Which field.
        code: Short name.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """How an answer is generated.

    Args:
        max_tokens: Longest answer.
        temperature: Of sampling; None for the greedy answer.
        top_p: Sample among the likeliest tokens of this joint probability.
        seed: Of sampling; None draws one.
        stop: The answer ends before the first of these.
        trim: Whether spaces before it are left out.
        passages: Passages wanted.
        quotes: Passages read once more before the prompt; None: as many as the model is asked with.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    trim: bool = False
    passages: int = 5
    quotes: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        model: Which memory, or the bare model.
        chat: Whether it is a conversation.
        messages: Of a conversation: role and content of each.
        prompts: Otherwise: texts, or token ids.
        n: Answers for each.
        wanted: How each is generated.
        stream: Whether they are wanted in pieces.
        usage: Whether a stream is to end with counts.
    """

    model: str
    chat: bool
    messages: tuple[Mapping[str, str], ...]
    prompts: tuple[str | list[int], ...]
    n: int
    wanted: Wanted
    stream: bool
    usage: bool


# What this server does not do, and the value that asks for nothing of it.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False, 0),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
_KNOWN = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop",
    "stream", "stream_options", "passages", "quotes", "user", "metadata", "store", "service_tier", "tool_choice",
    "parallel_tool_calls", "safety_identifier", "prompt_cache_key", *_UNSUPPORTED,
}  # fmt: skip


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        ApiError: It is none.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request is not valid JSON ({error}).", code="invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"The request must be a JSON object, not {_kind(given)}.", code="invalid_json")
    return given


def read_asked(body: bytes, chat: bool, settings: ServerSettings) -> Asked:
    """A request for answers.

    Args:
        body: As it came.
        chat: Whether it is one for a conversation.
        settings: Limits.

    Raises:
        ApiError: It cannot be answered; names the field.
    """
    given = read_json(body)
    for name, value in given.items():
        if name not in _KNOWN:
            raise ApiError(400, f"'{name}' is not known here. Leave it out.", name, "unknown_parameter")
        if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
            raise ApiError(400, f"'{name}' is not supported here. Leave it out.", name, "unsupported_parameter")
    model = _value(given, "model", str, "a text", None)
    if model is None:
        raise ApiError(400, "'model' is missing. GET /v1/models lists what there is.", "model", "missing_parameter")
    longest = "max_completion_tokens" if given.get("max_completion_tokens") is not None else "max_tokens"
    count = _number(given, longest, int, 1, settings.max_tokens, settings.max_tokens)
    temperature = _number(given, "temperature", float, 0, 1000, None)
    top_p = _number(given, "top_p", float, 0, 1, None)
    if top_p == 0:
        raise ApiError(400, "'top_p' must be above 0 and at most 1.", "top_p", "invalid_value")
    # Greedy unless something of sampling is named, as `lightning ask` does.
    sampled = temperature is not None or top_p is not None
    if temperature is not None and temperature < _COLDEST:
        sampled = False
    options = _value(given, "stream_options", dict, "an object", {})
    wanted = Wanted(
        max_tokens=count,
        temperature=(1.0 if temperature is None else temperature) if sampled else None,
        top_p=1.0 if top_p is None else top_p,
        seed=_number(given, "seed", int, -(2**63), 2**63 - 1, None),
        stop=_stops(given),
        passages=_number(given, "passages", int, 0, 50, 5),
        quotes=_number(given, "quotes", int, 0, 50, None),
    )
    return Asked(
        model,
        chat,
        _messages(given) if chat else (),
        () if chat else _prompts(given),
        _number(given, "n", int, 1, _MOST_CHOICES, 1),
        wanted,
        _value(given, "stream", bool, "true or false", False),
        _value(options, "include_usage", bool, "true or false", False),
    )


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _value(given: Mapping[str, Any], name: str, kind: type, called: str, default: Any) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ApiError(400, f"'{name}' must be {called}, not {_kind(value)}.", name, "invalid_type")
    return value


def _number(
    given: Mapping[str, Any], name: str, kind: Callable[..., Any], low: float, high: float, default: Any
) -> Any:
    value = given.get(name)
    if value is None:
        return default
    called = "a whole number" if kind is int else "a number"
    fits = isinstance(value, int) or (
        isinstance(value, float) and math.isfinite(value) and (kind is float or value % 1 == 0)
    )
    if isinstance(value, bool) or not fits:
        raise ApiError(400, f"'{name}' must be {called}, not {_kind(value)}.", name, "invalid_type")
    if not low <= value <= high:
        raise ApiError(400, f"'{name}' must be from {low} to {high}; it is {value}.", name, "invalid_value")
    return kind(value)


def _text(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, f"'{name}' holds half a surrogate pair.", name, "invalid_value") from None
    return value


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stops = given.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "'stop' must be a text or a list of texts, none empty.", "stop", "invalid_type")
    if len(stops) > _MOST_STOPS:
        raise ApiError(400, f"'stop' may hold {_MOST_STOPS} texts at most.", "stop", "invalid_value")
    return tuple(_text(stop, "stop") for stop in stops)


def _messages(given: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    messages = _value(given, "messages", list, "a list", [])
    if not messages:
        raise ApiError(400, "'messages' is empty. Give at least one message.", "messages", "invalid_value")
    read = []
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"'{name}' must be an object, not {_kind(message)}.", name, "invalid_type")
        role = message.get("role")
        if role not in _ROLES:
            raise ApiError(400, f"'{name}.role' must be one of {', '.join(_ROLES)}.", f"{name}.role", "invalid_value")
        read.append({"role": "system" if role == "developer" else role, "content": _content(message, name)})
    if read[-1]["role"] != "user":
        raise ApiError(400, "The last message must be the user's.", "messages", "invalid_value")
    if not read[-1]["content"].strip():
        raise ApiError(400, "The last message is empty. Ask something.", "messages", "invalid_value")
    return tuple(read)


def _content(message: Mapping[str, Any], name: str) -> str:
    content, field = message.get("content"), f"{name}.content"
    if isinstance(content, list):
        parts = content
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
                   for part in parts):  # fmt: skip
            raise ApiError(400, f"'{field}' may hold text alone.", field, "invalid_type")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise ApiError(
            400, f"'{name}.content' must be a text, not {_kind(content)}.", f"{name}.content", "invalid_type"
        )
    return _text(content, f"{name}.content")


def _prompts(given: Mapping[str, Any]) -> tuple[str | list[int], ...]:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(part) is int for part in prompt):
        prompts: list[Any] = [prompt]
    else:
        prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or len(prompts) > _MOST_CHOICES:
        raise ApiError(400, f"'prompt' must hold 1 to {_MOST_CHOICES} prompts.", "prompt", "invalid_value")
    for one in prompts:
        if isinstance(one, str):
            _text(one, "prompt")
        elif not isinstance(one, list) or not all(type(part) is int for part in one):
            raise ApiError(400, "'prompt' must be a text, token ids, or a list of these.", "prompt", "invalid_type")
        if not one:
            raise ApiError(400, "'prompt' is empty. Give a text to go on from.", "prompt", "invalid_value")
    return tuple(prompts)
