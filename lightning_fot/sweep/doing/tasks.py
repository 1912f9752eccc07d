"""Cells as tasks of a Ray cluster (the extra ``ray``): each is done once, by whichever process has room.

The process of the command draws trials, holds all claims and tells what has failed, as it does alone. A task that dies
with its process or its machine is begun again elsewhere, and goes on from what it has kept in the folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_fot.errors import SettingError
from lightning_fot.shards import engine
from lightning_fot.shards.shard import versions_here
from lightning_fot.sweep.doing.cell import Cell
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.measure import IndexCell, Recorded
from lightning_fot.sweep.settings import WORKERS as SETTING
from lightning_fot.sweep.settings import TaskSettings

# So often a task is begun again after its process or its machine has died.
_RETRIES = 4
_LOOK_S = 0.5
# So long a run may take to save what it has, once it is told to stop.
_STOP_S = 120.0


class Tasks:
    """Where cells are done: see above.

    Args:
        settings: How many at once, where, and what each reserves.
        folder: Of the sweep, on a disk that all machines see.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: The cluster cannot be joined, or has no room.
    """

    def __init__(self, settings: TaskSettings, folder: SweepFolder) -> None:
        self.count = settings.count
        self._settings, self._folder = settings, folder.path.resolve()
        self._ray = engine.connect(settings.address, SETTING)
        engine.refuse_without_room(self._ray, settings, SETTING)
        self._task = self._ray.remote(_do).options(**engine.reserved(settings), max_retries=_RETRIES)
        # Paths of the configuration may be relative.
        self._where = (str(self._folder), str(Path.cwd()), max(1, int(settings.cpus)))
        self._layers: dict[tuple[str, str], Any] = {}

    def greet(self, file: Path) -> None:
        """Refuses machines of the cluster that have other versions, or do not see the folder.

        Args:
            file: In the folder, written already.

        Raises:
            SettingError: One does not.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        look = self._ray.remote(_look)
        text, references = file.read_text(encoding="utf-8"), []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            references.append(look.options(num_cpus=0, scheduling_strategy=there).remote(str(file.resolve()), text))
        own = versions_here()
        answers = engine.wait_for(self._ray, references, "machines", SETTING)
        for node, (versions, sees) in zip(nodes, answers, strict=True):
            name = node["NodeManagerHostname"]
            other = {part: version for part, version in versions.items() if own[part] != version}
            if other:
                said = ", ".join(f"{part} {version}, not {own[part]}" for part, version in other.items())
                raise SettingError(SETTING, self.count, f"{name} has {said}", "Install the same versions everywhere.")
            if not sees:
                raise SettingError(
                    "run_dir", str(self._folder), f"is not the same folder on {name}",
                    "Give one on a disk that all machines of the cluster see.",
                )  # fmt: skip

    def begin(self, cell: Cell) -> Any:
        """Begins a cell; gives a ticket."""
        if not isinstance(cell, IndexCell):
            return self._task.remote(cell, [], *self._where)
        recorded = cell.recorded
        name = (recorded.name, recorded.identity)
        if name not in self._layers:
            # Once for all cells: keys are most of what travels.
            self._layers[name] = self._ray.put(replace(recorded, _truths={}))
        sent: Any = None
        return self._task.remote(replace(cell, recorded=sent), [self._layers[name]], *self._where)

    def ended(self, tickets: Sequence[Any]) -> list[Any]:
        """Those of some tickets whose cells have ended; waits half a second for one."""
        return engine.wait(self._ray, tickets, 1, _LOOK_S)

    def result(self, ticket: Any) -> None:
        """Raises what went wrong with a cell that has ended, as if it had been done here.

        Raises:
            RuntimeError: Its process died again and again.
            KeyboardInterrupt: Somebody has stopped it.
            Exception: What went wrong.
        """
        from ray import exceptions

        try:
            engine.result(self._ray, ticket)
        except exceptions.TaskCancelledError:
            raise KeyboardInterrupt from None
        except (engine.LostError, exceptions.RayError) as error:
            said = str(error).strip().splitlines()[0]
            raise RuntimeError(f"its process has died {_RETRIES + 1} times ({said}). See: ray logs") from error

    def stop(self, tickets: Sequence[Any]) -> None:
        """Has cells end soon, and waits until they have: runs save what they have."""
        for ticket in tickets:
            self._ray.cancel(ticket)
        engine.wait(self._ray, tickets, len(tickets), _STOP_S)


def _look(file: str, text: str) -> tuple[dict[str, str], bool]:
    """Which versions a machine has, and whether it sees a file."""
    try:
        return versions_here(), Path(file).read_text(encoding="utf-8") == text
    except OSError:
        return versions_here(), False


# The layer that this process was last asked about: exact neighbours among its keys are kept with it.
_known: dict[Any, Recorded] = {}


def _do(cell: Any, layers: Sequence[Any], folder: str, here: str, threads: int) -> None:
    """A task: does what is left of a cell."""
    if Path(here).is_dir():
        os.chdir(here)
    # Runs are processes of their own.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if layers:
        import ray

        torch.set_num_threads(threads)
        if layers[0] not in _known:
            _known.clear()
            _known[layers[0]] = ray.get(layers[0])
        cell = replace(cell, recorded=_known[layers[0]])
    cell.do(SweepFolder(Path(folder)), lambda: None)
