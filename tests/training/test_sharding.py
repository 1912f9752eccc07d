"""Training on two processes is training on one with the whole batch; the job's command works on both."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.slow


def _run(*words: str, cwd: Path) -> str:
    # Lightning starts the second process by the same command; both end, or the time is up and they are killed.
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=1e-5)


def test_two_ranks_learn_what_one_process_does(tmp_path):
    for ranks in ("1", "2"):
        _run(str(ROOT / "tests" / "support" / "training_ranks.py"), str(tmp_path), ranks, "all", cwd=tmp_path)
    weights = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    metrics = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    # The second rank has fewer targets; in `single` the first rank's row sees nothing.
    for kind in ("packed-inside", "packed-across", "paper-inside", "paper-across", "single"):
        _equal(weights[f"{kind}-1"], weights[f"{kind}-2"])
        for name in ("val/loss", "val/ppl"):
            assert metrics[f"{kind}-1"][name] == pytest.approx(metrics[f"{kind}-2"][name], rel=1e-5), kind
        assert metrics[f"{kind}-2"]["val/ppl"] == pytest.approx(math.exp(metrics[f"{kind}-2"]["val/loss"]), rel=1e-5)
    for kind in ("packed-across", "paper-across", "single"):
        assert metrics[f"{kind}-1"]["train/loss"] == pytest.approx(metrics[f"{kind}-2"]["train/loss"], rel=1e-5)
        # Counted over ranks: the second one has fewer.
        assert metrics[f"{kind}-1"]["train/tokens"] == metrics[f"{kind}-2"]["train/tokens"]
    for layout in ("packed", "paper"):
        # FSDP2: each rank holds half of every parameter.
        _equal(weights[f"{layout}-across-2"], weights[f"{layout}-sharded-2"])
        # What is shown across ranks is something else than what is shown inside one.
        inside, across = weights[f"{layout}-inside-2"], weights[f"{layout}-across-2"]
        assert any(not torch.allclose(inside[name], across[name], atol=1e-4) for name in inside)
    # A scheduler that waits for a metric sees the same one on both ranks.
    first, second = (json.loads((tmp_path / f"plateau-{rank}.txt").read_text()) for rank in range(2))
    assert first == second
    assert first["rate"] < 0.5
    # Weights, momentum and the place in the text move between one process of 8 rows and two of 4.
    _run(str(ROOT / "tests" / "support" / "training_ranks.py"), str(tmp_path), "1", "return", cwd=tmp_path)
    whole, *moved = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "one-two", "two-one")
    )
    for checkpoint in moved:
        assert checkpoint["global_step"] == whole["global_step"] == 4
        _equal(whole["state_dict"], checkpoint["state_dict"])


def test_what_cannot_go_on_stops_both_ranks(tmp_path):
    _run(str(ROOT / "tests" / "support" / "training_ranks.py"), str(tmp_path), "2", "refused", cwd=tmp_path)
    first, second = ((tmp_path / f"finite-{rank}.txt").read_text() for rank in range(2))
    assert "train/loss" in first
    assert "another process" in first
    assert "nan" in second
    for rank in range(2):
        assert "tensor_parallel_size" in (tmp_path / f"split-{rank}.txt").read_text()


def test_the_job_on_two_ranks_reports_once_and_its_checkpoint_moves_to_one(tmp_path):
    command = ["-m", "lightning_fot", "run", "--config", "smoke", "--run_dir=out", "--evaluation.passkey_samples=0"]
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.crossbatch.across_ranks=true"]
    said = _run(*command, *ddp, "--trainer.max_steps=3", cwd=tmp_path)
    assert said.count("Results: out") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows, window = 4, 64
    assert results["training"]["steps"] == 3
    assert results["training"]["tokens"] == 3 * 2 * rows * window
    assert results["complete"] is True
    _run(*command, *ddp, "--trainer.max_steps=4", "--ckpt_path=last", cwd=tmp_path)
    checked = [
        "-m",
        "lightning_fot",
        "validate",
        "--config",
        "out/config.yaml",
        "--ckpt_path=out/checkpoints/last.ckpt",
    ]
    said = _run(*checked, *ddp, "--ckpt_path=out/checkpoints/last.ckpt", cwd=tmp_path)
    assert said.count("val/loss") == 1
    said = _run(*command, "--trainer.max_steps=6", "--ckpt_path=last", cwd=tmp_path)
    assert "goes on after step 4 of 6" in said
    training = json.loads((tmp_path / "out" / "results.json").read_text())["training"]
    assert training["steps"] == 6
    assert training["tokens"] == (4 * 2 + 2) * rows * window


def test_fully_sharded_on_two_ranks_then_on_one(tmp_path):
    command = ["-m", "lightning_fot", "run", "--config", "smoke", "--run_dir=out", "--evaluation.passkey_samples=0"]
    sharded = [
        "--trainer.devices=2",
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.strategy.init_args.data_parallel_size=2",
        "--trainer.strategy.init_args.tensor_parallel_size=1",
        "--trainer.gradient_clip_val=1.0",
    ]
    for verb, word in (("fit", "save_distributed_checkpoint"), ("run", "Train with fit")):
        command[2] = verb
        refused = subprocess.run(
            [sys.executable, *command, *sharded],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=ENVIRONMENT,
            cwd=tmp_path,
            check=False,
        )
        assert refused.returncode == 2
        assert word in refused.stderr
    sharded.append("--trainer.strategy.init_args.save_distributed_checkpoint=false")
    command[2] = "fit"
    _run(*command, *sharded, "--trainer.max_steps=2", cwd=tmp_path)
    command[2] = "run"
    # Nothing is left to train: one process evaluates what two have trained.
    _run(*command, "--trainer.max_steps=2", "--ckpt_path=last", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps"] == 2
    assert results["complete"] is True
    said = _run(*command, "--trainer.max_steps=3", "--ckpt_path=last", cwd=tmp_path)
    assert "goes on after step 2 of 3" in said


def _runs(pid):
    """Whether a process is alive; one that has ended and that nobody has reaped is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "lightning_fot", "fit", "--config", "smoke", "--run_dir=out"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=100000"]
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    first = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path, start_new_session=True
    )
    try:
        # The first checkpoint is that of the first step.
        wait_until(last.exists, first)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        second = next(int(pid) for pid in children if b"lightning_fot" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(second, signal.SIGTERM)
        said = first.communicate(timeout=PATIENCE_S)[1]
        # The other ends by itself as well, perhaps a moment later.
        ends = time.monotonic() + PATIENCE_S
        while _runs(second):
            assert time.monotonic() < ends
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 128 + signal.SIGTERM, said
    assert "--ckpt_path=last" in said.replace(" last", "=last")
    assert torch.load(last, weights_only=True)["global_step"] >= 1
