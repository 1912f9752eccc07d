"""What cannot work is told by name, before any work."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_fot.cli import main
from lightning_fot.config.memory import ShardSettings
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.shards import engine, group
from lightning_fot.shards.group import Group
from tests.support import shards
from tests.support.models import settings
from tests.support.shards import new_memory, read_text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, r"model\.memory\.shards\.count=0: must be a whole number of at least 1"),
        ("two", r"model\.memory\.shards\.count='two'"),
        ({"address": "auto"}, r"does not say how many"),
        ({"count": 2, "adress": "auto"}, r"shards\.adress='auto': is not known. Did you mean address\?"),
        ({"count": 2, "cpus": -1}, r"shards\.cpus=-1"),
        ({"count": 2, "memory_mib": 0}, r"shards\.memory_mib=0"),
        ({"count": 2, "name": ""}, r"shards\.name=''"),
    ],
)
def test_settings_that_cannot_work(given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        settings(shards=given)


def test_nothing_loads_ray_unasked(repository: Path) -> None:
    code = (
        "import sys\nfrom lightning_fot import attach_pretrained\n"
        "lm = attach_pretrained('tiny-random-llama', memory_layers=[1], window=16)\nlm.new_memory()\n"
        "import lightning_fot.shards.place\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'lightning-fot\[ray\]'"):
        engine.library()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_fot.shards.engine.find_spec", lambda name: None)
    for words in (["ingest", "mine", "."], ["run", "--config", "smoke"]):
        assert main([*words, "--model.memory.shards=2", *(["--config=smoke"] if words[0] == "ingest" else [])]) == 2
        assert "pip install 'lightning-fot[ray]'" in capsys.readouterr().err


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:
        # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingError, match=rf"address='{address}': cannot be joined.*ray start --head"):
            Group(ShardSettings(1, address))
    with pytest.raises(SettingError, match=r"address='ray://somewhere:1': cannot be joined \(it is not HOST:PORT"):
        Group(ShardSettings(1, "ray://somewhere:1"))


def test_another_cluster_than_this_process_is_part_of(cluster: Any) -> None:
    with pytest.raises(SettingError, match="is not that of the cluster which this process is part of"):
        Group(ShardSettings(1, "10.0.0.1:6379"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 1, "cpus": 64}, r"shards\.cpus=64: is more than any machine of the cluster has"),
        ({"count": 1, "memory_mib": 1 << 30}, r"shards\.memory_mib=1073741824: is more than any machine"),
        ({"count": 3, "cpus": 1}, r"shards\.count=3: processes of cpus=1 do not fit"),
    ],
)
def test_shards_that_do_not_fit(cluster: Any, given: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        shards.place(given)


def test_other_versions_on_workers(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {**group.versions_here(), "torch": "1.0"}
    monkeypatch.setattr(group, "versions_here", lambda: own)
    with pytest.raises(SettingError, match=r"shard 0 runs with torch .*, not 1\.0"):
        Group(ShardSettings(1, cpus=0))


@pytest.mark.slow
def test_two_jobs_of_one_name(cluster: Any) -> None:
    named = ShardSettings(1, cpus=0, name="twins")
    first = Group(named)
    try:
        with pytest.raises(SettingError, match=r"shards\.name='twins': is that of another job"):
            Group(named)
    finally:
        first.close()


@pytest.mark.slow
def test_a_shard_that_is_full(cluster: Any) -> None:
    memory = new_memory(shards.place({"count": 1, "cpus": 0, "memory_mib": 1}), shards.shape(), 1)

    def fill() -> None:
        for seed in range(40):
            read_text(memory, [900], seed)

    with pytest.raises(SettingError, match=r"shards\.memory_mib=1: is full: pairs of shard 0 take \d+ MiB"):
        fill()
    # What fits is there, and what did not left no trace.
    assert len(memory) % 900 == 0
    assert memory.layers[1].lengths == memory.layers[3].lengths == [len(memory)]
