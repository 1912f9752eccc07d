from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fot.commands.job.choice import choose, claimed
from lightning_fot.errors import SettingError
from lightning_fot.request.preflight import check_folder
from lightning_fot.request.request import Request, read_request
from lightning_fot.system.files import write_json, write_text
from lightning_fot.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _request(**settings: object) -> Request:
    return Request("run", [Path("configs/hnsw.yaml")], [], dict(settings))


def _touch(path: str, text: str = "{}") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def test_first_run_gets_the_name_of_its_configuration() -> None:
    folder, checkpoint = choose(_request())
    assert folder.path == Path("runs/hnsw")
    assert checkpoint is None


def test_an_earlier_run_is_not_written_into() -> None:
    _touch("runs/hnsw/results.json")
    _touch("runs/hnsw-2/checkpoints/last.ckpt")
    request = _request()
    assert choose(request)[0].path == Path("runs/hnsw-3")
    assert "runs/hnsw-3" in request.notes[0]
    _touch("out/config.yaml")
    assert choose(_request(run_dir="out"))[0].path == Path("out-2")
    # Files that no run made are no run.
    _touch("mine/notes.txt")
    assert choose(_request(run_dir="mine"))[0].path == Path("mine")


def test_a_run_folders_own_configuration_has_the_runs_name() -> None:
    _touch("runs/hnsw-2/config.yaml")
    request = Request("run", [Path("runs/hnsw-2/config.yaml")], [], {})
    assert request.name == "hnsw"


def test_last_takes_the_newest_that_has_a_checkpoint() -> None:
    for name, age in (("hnsw", 300), ("hnsw-2", 200), ("hnsw-3", 100), ("hnsw_other", 0)):
        _touch(f"runs/{name}/config.yaml")
        if name != "hnsw-3":
            _touch(f"runs/{name}/checkpoints/last.ckpt")
            stamp = 1_000_000_000 - age
            os.utime(f"runs/{name}/checkpoints/last.ckpt", (stamp, stamp))
    request = _request(ckpt_path="last")
    folder, checkpoint = choose(request)
    assert folder.path == Path("runs/hnsw-2")
    assert checkpoint == Path("runs/hnsw-2/checkpoints/last.ckpt")
    assert "runs/hnsw-2" in request.notes[0]


_CLAIM = """
import sys
from pathlib import Path
from lightning_fot.commands.job.choice import choose, claimed
from lightning_fot.request.request import Request

request = Request("run", [Path("configs/hnsw.yaml")], [], {})
folder, _ = choose(request)
print("chosen", flush=True)
sys.stdin.readline()
with claimed(request, folder) as folder:
    folder.config.write_text("a run")
    print(folder.path, flush=True)
    sys.stdin.readline()
"""


def test_runs_at_once_have_a_folder_each(repository: Path) -> None:
    """All choose before one of them has written anything."""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", _CLAIM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    runs = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        for step in ("chosen", "runs/"):
            if step == "runs/":
                for run in runs:
                    run.stdin.write("go on\n")
                    run.stdin.flush()
            said = [run.stdout.readline().strip() for run in runs]
            assert all(one.startswith(step) for one in said)
        assert sorted(said) == ["runs/hnsw", "runs/hnsw-2", "runs/hnsw-3"]
        # Killed, a run keeps nobody out; ended, it leaves no lock.
        runs[0].kill()
        runs[0].wait()
        with claimed(_request(ckpt_path="last"), RunFolder(Path(said[0]))) as folder:
            assert str(folder.path) == said[0]
        with (
            pytest.raises(SettingError, match="another process is writing to it"),
            claimed(_request(ckpt_path="last"), RunFolder(Path(said[1]))),
        ):
            pytest.fail("two have it")
    finally:
        for run in runs:
            run.communicate("end\n" if run.poll() is None else None)
    assert not list(Path("runs").rglob(".lock"))


def test_a_folder_that_was_used_since_it_was_chosen_is_left_alone() -> None:
    _touch("runs/hnsw/config.yaml")
    request = _request()
    folder, _ = choose(request)
    assert folder.path == Path("runs/hnsw-2")
    # Others have begun and ended meanwhile, here and in the next one.
    _touch("runs/hnsw-2/config.yaml")
    _touch("runs/hnsw-3/config.yaml")
    with claimed(request, folder) as ours:
        assert ours.path == Path("runs/hnsw-4")
        assert request.notes[-1] == "Another process has just taken runs/hnsw-2: writing to runs/hnsw-4."
    assert sorted(path.name for path in Path("runs/hnsw-2").iterdir()) == ["config.yaml"]


def test_a_claim_leaves_nothing_where_nothing_was_written() -> None:
    request = _request()
    with claimed(request, choose(request)[0]) as folder:
        assert folder.path.is_dir()
    assert not folder.path.exists()
    _touch("file")
    with pytest.raises(SettingError, match="cannot be written"), claimed(request, RunFolder(Path("file/run"))):
        pytest.fail("there is no such folder")


@pytest.mark.parametrize("settings", [{}, {"run_dir": "out"}])
def test_last_without_a_checkpoint_is_refused(settings: dict[str, object]) -> None:
    _touch("out/config.yaml")
    _touch("runs/hnsw/config.yaml")
    with pytest.raises(SettingError, match=r"ckpt_path='last': there is no last\.ckpt"):
        choose(_request(ckpt_path="last", **settings))


def test_last_goes_on_with_the_evaluation_of_an_untrained_model() -> None:
    _touch("runs/hnsw/training.json", json.dumps({"steps": 0}))
    _touch("runs/hnsw/evaluation/partial.json")
    folder, checkpoint = choose(_request(ckpt_path="last"))
    assert folder.path == Path("runs/hnsw")
    assert checkpoint is None


def test_a_checkpoint_file_must_exist() -> None:
    with pytest.raises(SettingError, match="no such file"):
        choose(_request(ckpt_path="my.ckpt"))
    _touch("my.ckpt")
    assert choose(_request(ckpt_path="my.ckpt"))[1] == Path("my.ckpt")


def test_files_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("a/results.json")
    write_json(path, {"value": float("nan"), "list": (1, float("inf"))})
    assert json.loads(path.read_text()) == {"value": None, "list": [1, None]}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def fail(source: object, target: object) -> None:
        raise OSError("crash")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="crash"):
        write_text(path, "half")
    assert json.loads(path.read_text())["list"] == [1, None]
    assert os.listdir("a") == ["results.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_partial_results_belong_to_their_settings() -> None:
    folder = RunFolder(Path("run"))
    folder.write_partial("abc", {"phase": [{"value": 1}]})
    assert folder.read_partial("abc") == {"phase": [{"value": 1}]}
    assert folder.read_partial("other") == {}
    folder.partial.write_text("half a fi", encoding="utf-8")
    assert folder.read_partial("abc") == {}


def test_metrics_of_all_attempts_are_joined() -> None:
    folder = RunFolder(Path("run"))
    assert folder.log_version() == "version_0"
    _touch("run/logs/version_0/metrics.csv", "epoch,step,train/loss\n0,0,5.0\n0,1,4.0\n0,2,3.5\n")
    _touch("run/logs/version_1/metrics.csv", "epoch,step,train/loss,val/loss\n0,2,3.0,\n0,2,,9.0\n")
    assert folder.log_version() == "version_2"
    folder.write_metrics()
    assert folder.metrics.read_text().splitlines() == [
        "step,epoch,train/loss,val/loss",
        "0,0,5.0,",
        "1,0,4.0,",
        "2,0,3.0,",
        "2,0,,9.0",
    ]


def test_metrics_of_a_run_without_training() -> None:
    folder = RunFolder(Path("run"))
    folder.write_metrics()
    assert folder.metrics.read_text() == "step,epoch,train/loss\n"


def test_no_room_on_disk() -> None:
    with pytest.raises(SettingError, match=r"run_dir='out': needs about .* MiB and the disk has .* MiB free"):
        check_folder(Path("out"), 2**62)
    _touch("file")
    with pytest.raises(SettingError, match="is a file"):
        check_folder(Path("file/run"), 0)
    check_folder(Path("new/run"), 0)
    assert not Path("new").exists()


def test_the_command_to_go_on_can_be_pasted() -> None:
    words = ["--data.paths=[my books]", "--run_dir", "old", "--trainer.max_steps", "3", "-c", "configs/hnsw.yaml"]
    request = read_request("run", words)
    assert request.command(run_dir="runs/new", ckpt_path="last") == (
        "lightning run --config configs/hnsw.yaml '--data.paths=[my books]' --trainer.max_steps=3 "
        "--run_dir=runs/new --ckpt_path=last"
    )
