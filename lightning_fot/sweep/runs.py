"""The training cells of a sweep: each is a whole ``run`` in a process of its own, resumed where it stopped."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.grid import combinations, digest, label_of
from lightning_fot.system.digests import read_sealed
from lightning_fot.system.files import write_text
from lightning_fot.training.run_folder import RunFolder

_LOOK_S = 0.5


@dataclass(frozen=True)
class RunCell:
    """One run.

    Args:
        combination: Settings that tell it from the others.
        settings: The whole configuration, those included.
        parent: Folder of all runs of the sweep.
    """

    combination: dict[str, Any]
    settings: dict[str, Any]
    parent: Path

    @property
    def key(self) -> str:
        """Name of its file and of its folder."""
        return digest(["run", self.settings])

    @property
    def label(self) -> str:
        """For the screen."""
        return f"run {label_of(self.combination)}"

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        return RunFolder(self.parent / self.key)

    @property
    def cost(self) -> float:
        """More than that of any index."""
        return 1e6

    def is_done(self, known: Mapping[str, Any] | None) -> bool:
        """Whether there are results."""
        return bool((known or {}).get("rows"))

    def do(self, folder: SweepFolder, check: Callable[[], None]) -> None:
        """Does it, and keeps the results.

        Raises:
            RuntimeError: The run failed, with its last words.
            KeyboardInterrupt: It was stopped; it has saved what it had.
        """
        folder.write(self.key, self.run())

    def command(self) -> list[str]:
        """The command line that does it, or goes on with it."""
        words = [sys.executable, "-m", "lightning_fot.sweep.doing.child", str(os.getpid())]
        words += ["run", "--config", str(self._config())]
        words.append(f"--run_dir={self.folder.path}")
        return [*words, "--ckpt_path=last"] if self.folder.resumable else words

    def _config(self) -> Path:
        return self.parent / f"{self.key}.yaml"

    def run(self) -> dict[str, Any]:
        """Does it.

        Returns:
            The cell: its settings and the results.

        Raises:
            RuntimeError: The run failed, with its last words.
            KeyboardInterrupt: It was stopped; it has saved what it had.
        """
        import yaml

        write_text(self._config(), yaml.safe_dump(self.settings, sort_keys=False))
        if not self.folder.resumable and self.folder.path.exists():
            # What a killed start left behind: nothing in it can be gone on with.
            self.folder.path.rename(self.parent / f"{self.key}.{len(list(self.parent.iterdir()))}.stopped")
        log = self.parent / f"{self.key}.log"
        with log.open("ab") as file:
            code = _run(self.command(), file)
        if code in (130, 143):
            raise KeyboardInterrupt
        if code:
            words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(words[-1] if words else f"exit code {code}")
        results = read_sealed(self.folder.results)
        return {"settings": self.combination, "folder": str(self.folder.path), "rows": [headline(results)]}


def _run(words: list[str], log: Any) -> int:
    """Runs a command that saves what it has when this process is stopped; gives its exit code."""
    # A terminal tells all processes of a session to stop. It is told by us alone: told twice it would not save.
    with subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            while True:
                # Ray asks a task to stop where Python looks, which it does not while it waits without an end.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_LOOK_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise


def run_cells(grid: Mapping[str, Any], settings: Mapping[str, Any], parent: Path) -> list[RunCell]:
    """A run for every combination of the grid."""
    if not grid:
        return []
    return [RunCell(chosen, with_settings(settings, chosen), parent) for chosen in combinations(grid)]


def with_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with dotted ones replaced.

    Example:
        >>> with_settings({"model": {"top_k": 1}}, {"model.top_k": 2, "data.seed": 3})
        {'model': {'top_k': 2}, 'data': {'seed': 3}}
    """
    changed = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        node = changed
        *path, last = key.split(".")
        for part in path:
            below = node.get(part)
            node[part] = below if isinstance(below, dict) else {}
            node = node[part]
        node[last] = value
    return changed


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared between runs: loss, perplexity at the longest context, accuracy of tasks, r_d, recall."""
    training = results.get("training") or {}
    found: dict[str, Any] = {name: training.get(name) for name in ("steps", "tokens", "loss_first", "loss_last")}
    perplexity = results.get("perplexity") or []
    longest = max((row["context_tokens"] for row in perplexity), default=None)
    found["context_tokens"] = longest
    for row in perplexity:
        if row["context_tokens"] == longest:
            found[f"perplexity, {row['memory']}"] = row["value"]
    tasks = results.get("tasks") or []
    for row in tasks:
        if row.get("accuracy") is not None:
            found[f"{row['task']} {row['context_tokens']}, {row['memory']}"] = row["accuracy"]
    for row in results.get("distraction") or []:
        if row.get("own_share") is not None:
            found[f"r_d of {row['documents']} x {row['context_tokens']}, {row['memory']}"] = row["own_share"]
    marked = [row for row in results.get("retrieval") or [] if row.get("configured")]
    if marked:
        found["recall"] = sum(row["recall"] for row in marked) / len(marked)
    found["seconds"] = results.get("seconds")
    return found
