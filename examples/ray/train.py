"""``lightning run`` by workers of Ray Train, on one machine or many: any configuration, and the run folder as always.

python examples/ray/train.py 2 --config configs/smoke.yaml --run_dir=runs/two
python examples/ray/train.py 8 --gpu --address=auto --config configs/hnsw.yaml --run_dir=/shared/runs/eight
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

# A cluster that is started here: its workers are of the priority of this process, and Ray tells nobody of its use.
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Ray's own places in Lightning: which rank a worker has, where its device is, and who has begun the process group.
STRATEGY = "--trainer.strategy={class_path: ray.train.lightning.RayDDPStrategy}"
PLUGINS = "--trainer.plugins=[{class_path: ray.train.lightning.RayLightningEnvironment}]"


def work(given: dict[str, Any]) -> None:
    """What each worker does."""
    from lightning_fot.cli import main

    # Paths of the configuration may be relative.
    os.chdir(given["here"])
    code = main(["run", *given["words"], STRATEGY, PLUGINS, "--trainer.devices=auto"])
    if code:
        raise RuntimeError(f"lightning run ended with status {code}: what it said is above")


def main() -> None:
    """Starts the workers and waits for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int, help="processes that train, each with its share of the rows")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each")
    parser.add_argument("--address", help="of a Ray cluster, such as auto; without it one is started here")
    parser.add_argument("--cpus", type=float, default=1, help="cores for each (1)")
    options, words = parser.parse_known_args()
    if not any(word.startswith("--run_dir=") for word in words):
        parser.error("give --run_dir=FOLDER, on a disk that all machines see: workers write into one folder")

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=options.address or "local", include_dashboard=False if options.address is None else None)
    TorchTrainer(
        work,
        train_loop_config={"words": words, "here": str(Path.cwd())},
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=options.gpu, resources_per_worker={"CPU": options.cpus}
        ),
        # Ray's notes of its own; checkpoints and results are in the run folder.
        run_config=RunConfig(storage_path=str(Path(given_folder(words)).resolve() / "ray")),
    ).fit()


def given_folder(words: list[str]) -> str:
    """The run folder among the words."""
    return next(word.partition("=")[2] for word in words if word.startswith("--run_dir="))


if __name__ == "__main__":
    main()
