"""Uploads, against a hub of this machine that keeps what it is sent; and the cards of memories."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_fot import attach_memory, push_to_hub
from lightning_fot.errors import SettingError
from tests.support.models import settings, tiny_llama, tokens


@dataclass
class Hub:
    """What was sent."""

    address: str = ""
    status: int = 200
    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in found.files]
            self.answer(tree if "/tree/" in self.path else {"id": "me/it", "sha": "0" * 40})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.keys.add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                found.repositories.append(json.loads(body))
                self.answer({"url": f"{found.address}/me/it"})
            elif "/preupload/" in self.path:
                names = [one["path"] for one in json.loads(body)["files"]]
                self.answer(
                    {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
                )
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        found.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "deletedFile":
                        del found.files[value["path"]]
                self.answer({"commitUrl": f"{found.address}/me/it/commit/1", "commitOid": "1"})
            else:
                self.answer({"errors": [], "warnings": []})

        def answer(self, content: Any) -> None:
            said = json.dumps(content).encode()
            self.send_response(found.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield found
        server.shutdown()


def read(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_models_and_memories_are_uploaded_and_nothing_beside_them(hub: Hub, tmp_path: Path) -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.save_pretrained(tmp_path / "model")
        memory = lm.ingest(tokens(1, 30), lm.new_memory(), document="a <book>|1")
        memory.save(tmp_path / "memory")
        assert push_to_hub(tmp_path / "model", "me/it", token="hf_x").endswith("/commit/1")
        assert hub.files == read(tmp_path / "model", *(one.name for one in (tmp_path / "model").iterdir()))
        assert {"README.md", "config.json", "model.safetensors"} < set(hub.files)
        assert (hub.repositories[0]["name"], hub.repositories[0]["visibility"]) == ("it", "private")
        hub.files.clear()

        for name in (".lock", "library.json", "notes.txt"):
            (tmp_path / "memory" / name).write_text("mine")
        push_to_hub(tmp_path / "memory", "me/it", token="hf_x", private=False)
        assert (hub.repositories[1]["type"], hub.repositories[1]["visibility"]) == ("dataset", "public")
        assert sorted(name.split("-")[0] for name in hub.files) == ["README.md", "log", "memory", "memory.json"]
        # A memory that grew replaces it: files that it has no more go.
        (memory := lm.load_memory(tmp_path / "memory")).reset()
        lm.ingest(tokens(1, 40), memory, document="another").save(tmp_path / "memory")
        push_to_hub(tmp_path / "memory", "me/it", token="hf_x")
        for name, content in hub.files.items():
            (tmp_path / "came").mkdir(exist_ok=True)
            (tmp_path / "came" / name).write_bytes(content)
        assert len(hub.files) == 4
        came = lm.load_memory(tmp_path / "came")
        assert [one.name for one in came.documents] == ["another"]
    assert hub.keys == {"Bearer hf_x"}


def test_what_cannot_be_uploaded_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.ingest(tokens(1, 30), lm.new_memory()).save(tmp_path / "memory")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="holds no model, delta or memory"):
        push_to_hub(tmp_path / "empty", "me/it")
    with pytest.raises(SettingError, match="cannot be one"):
        push_to_hub(tmp_path / "memory", "me/../it", token="hf_x")
    hub.status = 403
    with pytest.raises(SettingError, match=r"refused by the hub \(.*403"):
        push_to_hub(tmp_path / "memory", "me/it", token="hf_x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SettingError, match="does not answer"):
        push_to_hub(tmp_path / "memory", "me/it", token="hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(tmp_path / "memory", "me/it", token="hf_x")
    assert not hub.files


def test_a_memory_has_a_card_that_follows_it_until_a_user_edits_it(tmp_path: Path) -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.ingest(tokens(1, 30), lm.new_memory(), document="a <b>|`1`")
        memory.save(tmp_path)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: lightning-fot\n")
        assert "# A memory of 1 document\n" in card
        assert "| a &lt;b&gt;&#124;&#96;1&#96; | 30 |" in card
        lm.ingest(tokens(1, 40, seed=1), memory, document="more").save(tmp_path)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "# A memory of 2 documents\n\n70 tokens" in card
        (tmp_path / "README.md").write_text(f"{card}My own words.\n", encoding="utf-8")
        memory.reset()
        memory.save(tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == f"{card}My own words.\n"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_somebody_has_put_in_the_place_of_a_card_is_left_alone(tmp_path: Path, kind: str) -> None:
    card = tmp_path / "README.md"
    if kind == "folder":
        card.mkdir()
    elif kind == "pipe":
        os.mkfifo(card)
    else:
        card.symlink_to("nowhere")
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.ingest(tokens(1, 30), lm.new_memory(), document="a").save(tmp_path)
        assert len(lm.load_memory(tmp_path)) == 30
    assert card.is_dir() or card.is_fifo() or card.is_symlink()
