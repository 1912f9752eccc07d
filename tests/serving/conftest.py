"""Two memories of tiny random models, and a server for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_fot.cli import main
from lightning_fot.library.library import Library
from tests.support.memories import SETTINGS, backbone, books
from tests.support.serving import Room, Running, running

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="package")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """The memories ``mine`` and ``other`` of one model, whose tokenizer has a chat template."""
    here = tmp_path_factory.mktemp("serving")
    books(here / "shelf", 3)
    books(here / "more", 1, words=90)
    backbone(here / "model", template=TEMPLATE)
    before = Path.cwd()
    os.chdir(here)
    try:
        for name, folder in (("mine", "shelf"), ("other", "more")):
            assert main(["ingest", name, folder, *SETTINGS, "--model.backbone=model"]) == 0
    finally:
        os.chdir(before)
    from lightning_fot.training.opening import open_model

    libraries = {name: Library.read(here / "memories" / name) for name in ("mine", "other")}
    lm, tokenizer = open_model(libraries["mine"].model)
    return Room(here, lm, tokenizer, libraries)


@pytest.fixture(scope="package")
def server(room: Room) -> Iterator[Running]:
    with running(room, max_batch=4, max_tokens=10**6) as found:
        yield found


@pytest.fixture
def own(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    """Memories that a test may change."""
    monkeypatch.chdir(room.folder)
    return room.copied(tmp_path)


@pytest.fixture
def fresh(own: Room) -> Iterator[Running]:
    """A server of those."""
    with running(own) as found:
        yield found
