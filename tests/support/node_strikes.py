"""A cluster of several nodes on this machine, whose shards and nodes are killed while a memory is used.

Run by a test, in a process of its own: ``python -m tests.support.node_strikes FOLDER KILLS SEED``. Prints what it has
found as JSON, the last line of its output, and a line for each kill before.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from lightning_fot.errors import SettingError
from lightning_fot.memory.found import Attended, Scoring
from lightning_fot.shards import engine
from tests.support.shards import attended, contents, new_memory, place, read_text, shape

SHARDS, SPARE = 2, 1
_STORE = 80 << 20


class Nodes:
    """The cluster: a head without cores, and a node with one core for each shard, and one to spare."""

    def __init__(self) -> None:
        self.ray: Any = engine.library()
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": _STORE, "include_dashboard": False, **ports()}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._new() for _ in range(SHARDS + SPARE)]
        self.ray.init(address=self.cluster.address, log_to_driver=False, configure_logging=False)

    def _new(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=_STORE, **ports())

    def close(self) -> None:
        self.ray.shutdown()
        self.cluster.shutdown()

    def of(self, pid: int) -> Any:
        """The node on which a process runs."""
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        (node,) = [one for one in self.nodes if raylet(one) == parent]
        return node

    def fail(self, node: Any) -> None:
        """As a machine that loses its power: all its processes at once."""
        victims = [raylet(node), *children(raylet(node))]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.nodes.remove(node)

    def replace(self) -> None:
        """Another machine in place of each that has failed."""
        while len(self.nodes) < SHARDS + SPARE:
            self.nodes.append(self._new())


def ports() -> dict[str, int]:
    """Free ports for a node's helpers. Where they choose their own, a node waits 15 seconds for them and gives up."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: int(one.getsockname()[1]) for name, one in zip(names, sockets, strict=True)}


def raylet(node: Any) -> int:
    """Number of a node's process."""
    from ray._private import ray_constants

    return int(node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid)


def children(parent: int) -> list[int]:
    """Numbers of the processes that another has started."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(path.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wrong(own: Any, other: Any, seed: int) -> int:
    """Layers whose answer is not that of a memory in one process."""
    queries = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(seed))
    count = 0
    for number, layer in own.layers.items():
        plain = other.layers[number]
        found = layer.read(queries, 9, 0, Scoring(0.5))
        if not len(other):
            continue
        assert isinstance(found, Attended)
        out, lse = attended(plain.keys, plain.values, plain.lengths, queries, 9, 0.5)
        close = all(
            torch.allclose(got.double(), want, atol=1e-4, rtol=1e-3)
            for got, want in ((found.out, out), (found.lse, lse))
        )
        count += not close
    return count


def lost(own: Any, other: Any) -> int:
    """Pairs that were acknowledged, and are not there as they were."""
    count = 0
    for number, layer in own.layers.items():
        for mine, theirs in zip(contents(layer), contents(other.layers[number]), strict=True):
            for got, want in zip(mine, theirs, strict=True):
                if got.shape != want.shape:
                    count += abs(got.shape[1] - want.shape[1]) or 1
                else:
                    count += int((got != want).any(-1).sum())
    return count


class Killer(threading.Thread):
    """Kills the process of a shard, or its whole node, a moment after it was started."""

    def __init__(self, nodes: Nodes, pid: int, whole: bool, after: float) -> None:
        super().__init__()
        self._nodes, self._pid, self.whole, self._after = nodes, pid, whole, after

    def run(self) -> None:
        time.sleep(self._after)
        if self.whole:
            self._nodes.fail(self._nodes.of(self._pid))
        else:
            os.kill(self._pid, signal.SIGKILL)


def strike(nodes: Nodes, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Changes, saves and asks a memory while shards and nodes are killed."""
    draw = random.Random(seed)
    where: Any = place({"count": SHARDS, "cpus": 1})
    own, other = new_memory(where, shape(), 2, capacity=200), new_memory(None, shape(), 2, capacity=200)
    found = {"kills": 0, "nodes": 0, "lost": 0, "wrong": 0}
    began, step = time.monotonic(), 0
    while found["kills"] < kills:
        step += 1
        pid = where.group.answer(where.group.ask(draw.randrange(SHARDS), "process"))
        killer = Killer(nodes, pid, draw.random() < 0.5, draw.random() * 0.2)
        killer.start()
        doing = ["read", "read", "read", "forget", "save", "ask"]
        for kind in [draw.choice(doing) for _ in range(4)]:
            number = draw.getrandbits(30)
            if kind == "read":
                for memory in (own, other):
                    read_text(memory, [number % 23 + 1, number % 7 + 1], number, f"text {number % 3}")
            elif kind == "forget" and other.documents:
                name = other.documents[number % len(other.documents)].name
                if own.forget(name) != other.forget(name):
                    found["wrong"] += 1
            elif kind == "save":
                own.save(folder)
            found["wrong"] += wrong(own, other, number)
        killer.join()
        # After the kill, whether or not something was under way when it came.
        found["wrong"] += wrong(own, other, step)
        found["lost"] += lost(own, other)
        found["kills"] += 1
        found["nodes"] += killer.whole
        what = "node" if killer.whole else "shard"
        print(f"{time.monotonic() - began:6.1f} s: {what} killed, {len(other)} pairs, {found}", flush=True)
        nodes.replace()
    found["losses"] = int(where.group.losses)
    return found


def refused(nodes: Nodes, folder: Path) -> str:
    """What is said when a node fails, and the files that its shard would be made of are not to be reached."""
    where: Any = place({"count": SHARDS, "cpus": 1})
    memory = new_memory(where, shape(), 2)
    read_text(memory, [20, 20], 0)
    read_text(memory, [20, 20], 1)
    memory.save(folder)
    shutil.rmtree(folder)
    nodes.fail(nodes.of(where.group.answer(where.group.ask(1, "process"))))
    try:
        memory.layers[1].read(torch.randn(2, 2, 4, 8), 9, 0, Scoring(0.5))
    except SettingError as error:
        return str(error)
    return "an answer"


def main() -> None:
    """Runs it."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    nodes = Nodes()
    try:
        found: dict[str, Any] = strike(nodes, folder / "saved", kills, seed)
        found["said"] = refused(nodes, folder / "gone")
    finally:
        nodes.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
