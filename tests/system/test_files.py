"""What is written may be read by whom the user's umask lets: models and memories are shared on clusters."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.config import CrossbatchConfig
from lightning_fot.config.backbone import LoraSettings
from lightning_fot.pretrained import load_backbone
from lightning_fot.retrievers import create_retriever
from lightning_fot.system.files import lock, replacing, writing
from lightning_fot.training.module import FocusedTransformer
from lightning_fot.training.parameters import save_adapter

MEMORY = MemoryConfig(memory_layers=[1, 3], window=16, top_k=4)


@pytest.fixture(params=[0o022, 0o027, 0o007])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _check(folder: Path, umask: int) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask, path


def test_models_and_memories(tmp_path: Path, umask: int) -> None:
    with attach_memory(load_backbone("tiny-random-llama"), MEMORY) as lm:
        lm.save_pretrained(tmp_path / "model")
        lm.ingest(torch.arange(3, 83)[None], lm.new_memory()).save(tmp_path / "memory")
    _check(tmp_path / "model", umask)
    _check(tmp_path / "memory", umask)


def test_keys_of_a_retriever(tmp_path: Path, umask: int) -> None:
    retriever = create_retriever("exact", dim=8)
    retriever.add(torch.randn(1, 20, 8))
    retriever.save(tmp_path / "keys")
    _check(tmp_path / "keys", umask)


def test_adapters(tmp_path: Path, umask: int) -> None:
    pytest.importorskip("peft")
    module = FocusedTransformer("tiny-random-llama", MEMORY, CrossbatchConfig(), lora=LoraSettings(rank=2))
    module.configure_model()
    save_adapter(module.backbone, tmp_path / "adapter")
    _check(tmp_path / "adapter", umask)


def test_a_file_and_a_folder(tmp_path: Path, umask: int) -> None:
    with replacing(tmp_path / "folder") as folder:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "file").touch(mode=0o600)
    with writing(tmp_path / "folder" / "file") as file:
        file.touch(mode=0o600)
    _check(tmp_path / "folder", umask)


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    held = lock(path)
    assert held is not None
    assert lock(path) is None
    # Removed by whoever holds it, the name is free: who waited gets the new file, not the old one.
    path.unlink()
    other = lock(path)
    assert other is not None
    held.close()
    assert lock(path) is None
    other.close()
    again = lock(path)
    assert again is not None
    again.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    first, second = lock(tmp_path / ".lock"), lock(tmp_path / ".lock")
    assert first is not None
    assert second is not None
    first.close()
    second.close()
