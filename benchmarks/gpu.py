"""Everything that waits for a GPU, in one go and within a budget: trains, evaluates, measures, brings back small files.

    python benchmarks/gpu.py OUT                    # twelve minutes on one GPU
    python benchmarks/gpu.py OUT --minutes 120 --only dictionary,passkey
    python benchmarks/gpu.py OUT --tiny             # the same steps in small, on any CPU: shows that it works

Each step has a share of the time; a training ends when its share is over and is evaluated. A step that fails does not
stop those behind it. The same command again goes on: steps that are done are skipped, trainings resume. In
``OUT/NAME`` lie the log and what is worth keeping (results, report, trained differences), in ``OUT/summary.md`` what
became of each step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("results.json", "report.html", "config.yaml", "metrics.csv", "recall_vs_speed.png")
_GRACE = 60.0  # seconds that a step has to save, when its time is over


@dataclass
class Step:
    """A command in the repository's root.

    Attributes:
        name: Its folder.
        words: What follows ``python``.
        share: Of all the time, what it may take.
        run: Its run folder has files to keep.
        train: Of its own time, what training may take; 0 where it trains nothing.
        delta: What training changed is brought back too.
        needs: A library without which it is left out.
        took: Seconds that it took.
    """

    name: str
    words: list[str]
    share: float
    run: bool = False
    train: float = 0.0
    delta: bool = False
    needs: str | None = None
    took: float = field(default=0.0, init=False)


def steps(tiny: bool) -> list[Step]:
    """What is done, most wanted first."""
    device = "cpu" if tiny else "gpu"
    run = ["-m", "lightning_fot", "run", f"--trainer.accelerator={device}", "--trainer.devices=1"]
    quick = ["--quick", "--sections", "a"] if tiny else ["--device", "cuda"]
    small = {
        "dictionary": """--data.batch_size=4 --model.crossbatch.schedule=null --trainer.max_steps=4
            --evaluation.dictionary.tokens=[4096] --evaluation.dictionary.questions=32 --evaluation.distraction=null""",
        "passkey": """--model.backbone=tiny-random-llama --model.memory.memory_layers=[1,3] --trainer.max_steps=1
            --evaluation.context_tokens=[512] --evaluation.passkey_tokens=[512]""",
    }
    full = {
        # As large as the paper's: 12 layers of width 512.
        "dictionary": """--model.backbone=configs/paper/dictionary_model_large.json --model.memory.memory_layers=[7]
            --trainer.precision=bf16-mixed --trainer.max_steps=4000 --data.batch_size=64
            --model.crossbatch.schedule.values=[1,64] --model.optimizer.init_args.lr=5e-4""",
        "passkey": """--trainer.precision=bf16-mixed --trainer.max_steps=1000 --data.batch_size=32
            --model.memory.retriever={"name":"faiss_ivf","index_dtype":"int8"} --evaluation.exact_tokens=300000
            --evaluation.passkey_tokens=[2048,8192,32768,131072,262144,1048576] --evaluation.passkey_samples=10""",
    }
    chosen = small if tiny else full
    scan = ["--device", device, "--tiny"] if tiny else ["--device", "cuda"]
    return [
        Step("tests", ["-m", "pytest", "-q", "-n0", "tests/model/attention/test_shared_windows.py"], share=0.1),
        # Triton's kernels against torch: in its interpreter on a CPU, compiled on a GPU.
        Step("kernels", ["tests/kernels/interpreted.py"], share=0.1, needs="triton"),
        Step("scan", ["benchmarks/device_scan.py", *scan, "--json", "{out}/scan.json"], share=0.15),
        Step("crossbatch", ["benchmarks/crossbatch.py", *quick, "--json", "{out}/crossbatch.json"], share=0.1),
        Step(
            "passkey",
            [*run, "--config", "configs/paper/smollm2_fot.yaml", *chosen["passkey"].split()],
            share=0.35,
            run=True,
            train=0.4,
            delta=True,
        ),
        Step(
            "dictionary",
            [*run, "--config", "configs/paper/dictionary.yaml", *chosen["dictionary"].split()],
            share=0.25,
            run=True,
            train=0.6,
        ),
    ]


def done(step: Step, out: Path, deadline: float, minutes: float, tiny: bool) -> str:
    """Runs a step, or what is left of it; says what became of it."""
    folder = out / step.name
    if (folder / "done").is_file():
        return "done before"
    if step.needs is not None and find_spec(step.needs) is None:
        return f"left out: {step.needs} is not installed"
    seconds = min(step.share * minutes * 60, deadline - time.monotonic())
    if seconds < 1:
        return "no time left"
    folder.mkdir(parents=True, exist_ok=True)
    words = [word.replace("{out}", str(folder)) for word in step.words]
    if step.run:
        words.append(f"--run_dir={folder / 'run'}")
        if (folder / "run" / "checkpoints" / "last.ckpt").is_file():
            words.append("--ckpt_path=last")
    if step.train:
        words.append(f"--trainer.max_time={_clock(step.train * seconds)}")
    # The checkout, whether it is installed or not.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, **({"TRITON_INTERPRET": "1"} if tiny else {})}
    began = time.monotonic()
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        print("$ python", *words, file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        )  # fmt: skip
        outcome = _ended(process, seconds)
    step.took = time.monotonic() - began
    if step.run:
        _keep(folder, step.delta and outcome == "done")
    if outcome == "done":
        (folder / "done").touch()
    return outcome


def _ended(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        code = process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        # The whole session: a run has workers. It saves, and tells what it has measured so far.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return "out of time; the same command again goes on"
    return "done" if code == 0 else f"failed with {code}: see its log"


def _keep(folder: Path, delta: bool) -> None:
    """Copies the small files of a run beside its log, and what training changed."""
    for name in KEPT:
        if (folder / "run" / name).is_file():
            shutil.copy2(folder / "run" / name, folder / name)
    if delta:
        words = [sys.executable, "-m", "lightning_fot", "export", str(folder / "run"), str(folder / "delta"), "--delta"]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)


def _clock(seconds: float) -> str:
    """Days, hours, minutes and seconds as Lightning reads them."""
    whole = max(1, int(seconds))
    return f"{whole // 86400:02}:{whole // 3600 % 24:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def _figures(folder: Path) -> str:
    """Right answers of a run, shortest first: ``name tokens memory right/asked``."""
    if not (folder / "results.json").is_file():
        return ""
    tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
    return "; ".join(
        f"{row['task']} {row['context_tokens']:,} {row['memory']} {row['correct']}/{row['n']}"
        for row in tasks
        if "correct" in row
    )


def main() -> None:
    """Does all steps, or those chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for what is brought back")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all steps together")
    parser.add_argument("--only", help="names of steps, with commas")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    given = parser.parse_args()
    chosen = steps(given.tiny)
    names = [step.name for step in chosen]
    wanted = given.only.split(",") if given.only else names
    if not set(wanted) <= set(names):
        parser.error(f"--only {given.only}: choose of {','.join(names)}")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.minutes * 60
    failed = False
    lines = ["| step | outcome | minutes | figures |", "|---|---|---|---|"]
    for step in chosen:
        if step.name in wanted:
            outcome = done(step, out, deadline, given.minutes, given.tiny)
            failed |= outcome.startswith("failed")
            lines.append(f"| {step.name} | {outcome} | {step.took / 60:.1f} | {_figures(out / step.name)} |")
            print(lines[-1], flush=True)
            (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
