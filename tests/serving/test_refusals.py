"""What a server refuses: told in OpenAI's form, and the next request is answered."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from lightning_fot.errors import SettingError
from lightning_fot.serving.settings import ServerSettings
from tests.support.patience import PATIENCE_S
from tests.support.serving import Room, Running, running

GOOD = {"model": "mine", "messages": [{"role": "user", "content": "word5"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


def asked(running: Running, body: bytes | None, path: str = CHAT, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request made by hand."""
    connection = HTTPConnection(urlsplit(running.address).netloc, timeout=PATIENCE_S)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def message(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x", **changes}]}


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "nine"}, 404, "model", "model_not_found"),
        ({"model": "../mine"}, 404, "model", "model_not_found"),
        ({"model": None}, 400, "model", "missing_parameter"),
        ({"model": 3}, 400, "model", "invalid_type"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": "hello"}, 400, "messages", "invalid_type"),
        ({"messages": ["hello"]}, 400, "messages[0]", "invalid_type"),
        (message(role="robot"), 400, "messages[0].role", "invalid_value"),
        (message(role="assistant"), 400, "messages", "invalid_value"),
        (message(content="  "), 400, "messages", "invalid_value"),
        (message(content=7), 400, "messages[0].content", "invalid_type"),
        (message(content=[{"type": "image_url", "image_url": {}}]), 400, "messages[0].content", "invalid_type"),
        (message(content="\ud800"), 400, "messages[0].content", "invalid_value"),
        (message(content="x" * 300), 400, "messages", "context_length_exceeded"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**7}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": "2"}, 400, "max_tokens", "invalid_type"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "invalid_type"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": True}, 400, "temperature", "invalid_type"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"n": 100}, 400, "n", "invalid_value"),
        ({"seed": "x"}, 400, "seed", "invalid_type"),
        ({"stop": [1]}, 400, "stop", "invalid_type"),
        ({"stop": ["a"] * 9}, 400, "stop", "invalid_value"),
        ({"stream": "yes"}, 400, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": 1}}, 400, "include_usage", "invalid_type"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"max_token": 3}, 400, "max_token", "unknown_parameter"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told(
    strict: Running, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    found, content = asked(strict, json.dumps({**GOOD, **change}).encode())
    error = content["error"]
    assert (found, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500


@pytest.fixture(scope="module")
def strict(room: Room) -> Any:
    """A server with low limits."""
    with running(room, max_prompt_tokens=200, max_body_bytes=4000, max_document_bytes=4000) as found:
        yield found


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b'"text"', b"[" * 3000])
def test_what_is_no_json_object_is_told(strict: Running, body: bytes) -> None:
    status, content = asked(strict, body)
    assert (status, content["error"]["code"]) == (400, "invalid_json")


def test_a_request_of_ten_megabytes_is_refused_and_the_next_one_answered(strict: Running) -> None:
    status, content = asked(strict, json.dumps({**GOOD, "messages": message(content="x" * 10**7)["messages"]}).encode())
    assert (status, content["error"]["code"]) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as refused:
        strict.client().chat.completions.create(model="mine", messages=[{"role": "user", "content": "x" * 10**7}])
    assert refused.value.status_code == 413
    assert asked(strict, json.dumps(GOOD).encode())[0] == 200


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1, "a"], 3, [10**9], [-1]])
def test_a_prompt_that_is_none_is_told(strict: Running, prompt: Any) -> None:
    status, content = asked(strict, json.dumps({"model": "mine", "prompt": prompt}).encode(), "/v1/completions")
    assert (status, content["error"]["param"]) == (400, "prompt")


def test_other_paths_and_methods_are_told_in_the_same_form(strict: Running) -> None:
    assert asked(strict, None, "/v1/nothing")[0] == 404
    assert asked(strict, b"{}", "/v1/models")[0] == 405
    status, content = asked(strict, None, CHAT)
    assert (status, content["error"]["type"]) == (405, "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        strict.client().models.retrieve("nine")


def test_without_a_key_pages_of_other_sites_are_refused(strict: Running) -> None:
    """Such a page may have its own name point to this machine, and a browser tells which page it is that asks."""
    body, own = json.dumps(GOOD).encode(), urlsplit(strict.address).netloc
    assert asked(strict, body, Host="evil.example")[0] == 403
    assert asked(strict, body, Origin="http://evil.example")[0] == 403
    assert asked(strict, body, Origin="null")[0] == 403
    assert asked(strict, body, Origin=f"http://{own}")[0] == 200
    assert asked(strict, body, Host="localhost:1")[0] == 200


def test_with_a_key_nothing_of_a_memory_is_told_without_it(room: Room) -> None:
    with running(room, api_key="long-secret") as locked:
        for key in ("", "long-secre", "long-secret1", "Long-secret", "ä"):
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                status, content = asked(locked, None, path, **headers)
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert asked(locked, None, "/v1/models", Authorization="Basic long-secret")[0] == 401
        assert asked(locked, None, "/health")[0] == 200
        assert asked(locked, None, "/v1/models", Authorization="bearer long-secret", Host="name.example")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            locked.client("wrong").models.list()
        assert [model.id for model in locked.client("long-secret").models.list()] == ["mine", "other", "model"]


def test_connections_that_say_nothing_are_closed(room: Room) -> None:
    with running(room, timeout=0.2) as impatient:
        host, _, port = urlsplit(impatient.address).netloc.partition(":")
        silent = [socket.create_connection((host, int(port)), PATIENCE_S) for _ in range(50)]
        silent.append(socket.create_connection((host, int(port)), PATIENCE_S))
        silent[-1].sendall(b"POST /v1/completions HTT")
        for one in silent:
            assert one.recv(1000) == b""
            one.close()
        slow = socket.create_connection((host, int(port)), PATIENCE_S)
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        slow.close()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"host": "0.0.0.0"}, "host"),
        ({"host": "0.0.0.0", "api_key": ""}, "api_key"),
        ({"api_key": " a"}, "api_key"),
        ({"api_key": "ä"}, "api_key"),
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": -1}, "max_queue"),
        ({"timeout": 0.0}, "timeout"),
        ({"grace": float("nan")}, "grace"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], setting: str) -> None:
    with pytest.raises(SettingError) as refused:
        ServerSettings(**change)
    assert refused.value.setting == setting


def test_an_address_that_is_taken_is_told(room: Room) -> None:
    from lightning_fot.serving.server import Server

    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(SettingError, match="cannot be listened at"):
            Server(room.lm, room.tokenizer, room.libraries, settings)
