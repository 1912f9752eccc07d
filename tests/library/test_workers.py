"""Documents read by several processes: what one process makes of each of them, whoever dies over it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from lightning_fot.library import workers
from lightning_fot.library.workers import Workers
from lightning_fot.pretrained import load_backbone
from lightning_fot.request.model import ModelSettings
from tests.support.memories import SETTINGS, contents, text

MEMORY = {"memory_layers": [1, 3], "window": 32, "top_k": 8, "skip_window_start": 1}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shelf(folder: Path) -> dict[str, str]:
    """Documents of very different lengths."""
    folder.mkdir()
    documents = {f"shelf/book{number}.txt": text(number, size) for number, size in enumerate((40, 300, 5, 120, 80))}
    for name, words in documents.items():
        (folder.parent / name).write_text(words, encoding="utf-8")
    return documents


def expected(documents: list[tuple[str, list[int]]], **changes: Any) -> dict[str, torch.Tensor]:
    """Pairs of each document read beside an empty memory, one document after the other."""
    with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(**{**MEMORY, **changes})) as lm:
        memories = [lm.ingest(torch.tensor([ids]), lm.new_memory()) for _, ids in documents]
        return {
            f"{number}.{name}": torch.cat([getattr(memory.layers[number], name) for memory in memories], dim=2)
            for number in lm.memory_layers
            for name in ("keys", "values")
        }


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--model.memory.overlap=8", "--model.memory.sink_tokens=2")])
def test_the_memory_is_that_of_each_document_by_itself(
    cluster: Any, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    documents = shelf(here / "shelf")
    assert main(["ingest", "mine", "shelf", "--workers", "2", *SETTINGS, *words]) == 0
    assert re.search(r"Read 5 documents, [\d,]+ tokens", capsys.readouterr().out)
    found = contents(here / "memories" / "mine")
    ids = [(name, [byte + 3 for byte in words.encode()]) for name, words in documents.items()]
    if not words:
        assert [(name, tokens) for name, _, _, tokens in found.documents] == ids
    # Sinks leave the window last, and are logged last.
    assert [(name, sorted(tokens)) for name, _, _, tokens in found.documents] == [
        (name, sorted(tokens)) for name, tokens in ids
    ]
    changes = {"overlap": 8, "sink_tokens": 2} if words else {}
    for name, want in expected(ids, **changes).items():
        torch.testing.assert_close(found.pairs[name], want, atol=1e-5, rtol=1e-4)
    # What was read is not read again.
    assert main(["ingest", "mine", "shelf", "--workers", "2"]) == 0
    assert "Nothing to read" in capsys.readouterr().out


def settings_of_tests() -> ModelSettings:
    return ModelSettings(backbone="tiny-random-llama", memory=dict(MEMORY))


@pytest.mark.slow
def test_workers_that_die_lose_nothing_and_read_nothing_twice(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PART_TOKENS", 64)
    with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(**MEMORY)) as lm:
        fingerprint = lm.new_memory().fingerprint()  # type: ignore[misc]
    several = Workers(2, settings_of_tests(), None, fingerprint)
    try:
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(3, 250, (size,), generator=generator) for size in (700, 30, 5000, 300, 4500, 90)]
        # Asked before they have work: a process answers one call after the other.
        victims = cluster.get([each.actor.process.remote() for each in several._processes])
        jobs = [several.begin(one) for one in texts]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        found: list[list[workers.Part]] = [list(several.parts(job, lambda: None)) for job in jobs]
        assert several.losses >= 1
    finally:
        several.close()
    for one, parts in zip(texts, found, strict=True):
        read = torch.cat([workers.unpack(part.ids)[0] for part in parts])
        assert torch.equal(read, one)
        want = expected([("", one.tolist())])
        for layer in (1, 3):
            for place, name in enumerate(("keys", "values")):
                got = torch.cat([workers.unpack(part.pairs[layer][place]) for part in parts], dim=2)
                torch.testing.assert_close(got, want[f"{layer}.{name}"], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_workers_with_another_model_are_refused(cluster: Any) -> None:
    with pytest.raises(SettingError, match="another model of that name"):
        Workers(1, settings_of_tests(), None, {"made": "elsewhere"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "0"), r"--workers=0: must be at least 1"),
        (("--address", "10.0.0.1:6379"), r"--address.*Give --workers too"),
    ],
)
def test_what_cannot_work_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (here / "one.txt").write_text("some words", encoding="utf-8")
    assert main(["ingest", "mine", "one.txt", *SETTINGS, *words]) == 2
    assert re.search(message, capsys.readouterr().err)
