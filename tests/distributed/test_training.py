"""Training on two processes is training on one with the whole batch; the job's command works on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _run(*words: str, cwd: Path) -> str:
    # Lightning starts the second process by the same command; both end, or the time is up and they are killed.
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=200, env=ENVIRONMENT, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_ranks_learn_what_one_process_does(tmp_path):
    for ranks in (1, 2):
        _run(str(ROOT / "tests" / "distributed" / "ranks.py"), str(tmp_path), str(ranks), cwd=tmp_path)
    for kind in ("packed-inside", "packed-across", "paper-inside", "paper-across"):
        one, two = (torch.load(tmp_path / f"{kind}-{ranks}.pt", weights_only=True) for ranks in (1, 2))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=1e-5)
        losses = [json.loads((tmp_path / f"{kind}-{ranks}.json").read_text()) for ranks in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # FSDP2: each rank holds half of every parameter.
    for layout in ("packed", "paper"):
        whole = torch.load(tmp_path / f"{layout}-across-2.pt", weights_only=True)
        parts = torch.load(tmp_path / f"{layout}-across-2-sharded.pt", weights_only=True)
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, atol=2e-6, rtol=1e-5)
    # What is shown across ranks is something else than what is shown inside one.
    for layout in ("packed", "paper"):
        inside, across = (
            torch.load(tmp_path / f"{layout}-{kind}-2.pt", weights_only=True) for kind in ("inside", "across")
        )
        assert any(not torch.allclose(inside[name], across[name], atol=1e-4) for name in inside)


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
        "--trainer.gradient_clip_val=null",
    ]
    refused = subprocess.run(
        [sys.executable, *command, *sharded],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
    )
    assert refused.returncode == 2
    assert "save_distributed_checkpoint" in refused.stderr
    sharded.append("--trainer.strategy.init_args.save_distributed_checkpoint=false")
    command[2] = "fit"
    _run(*command, *sharded, "--trainer.max_steps=2", cwd=tmp_path)
    command[2] = "run"
    said = _run(*command, "--trainer.max_steps=3", "--ckpt_path=last", cwd=tmp_path)
    assert "goes on after step 2 of 3" in said
