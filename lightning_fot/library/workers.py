"""Documents read by several processes of a Ray cluster, each with a backbone of its own.

Each document is read by itself, beside what was read of it so far and of no other; its pairs then join the memory, one
document after the other, in the order in which they were found. So the memory is that of one process which reads every
document beside an empty memory and adds up the pairs, however many read and whichever of them dies. It is not that of
``ingest`` without workers, where a document is read beside those before it: see ``docs/scale.md``.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fot.config.memory import ShardSettings
from lightning_fot.errors import SettingError
from lightning_fot.library.ingest import ChangedError, Reader
from lightning_fot.memory.token_log import TokensRead
from lightning_fot.request.model import ModelSettings
from lightning_fot.shards import engine
from lightning_fot.shards.engine import LostError
from lightning_fot.shards.packing import Packed, pack, unpack
from lightning_fot.shards.shard import versions_here
from lightning_fot.training.opening import open_model

if TYPE_CHECKING:
    from lightning_fot.library.changes import Unread
    from lightning_fot.library.library import Entry
    from lightning_fot.model.lm import MemoryLM

SETTING = "workers"
# Tokens of a document whose pairs travel at once.
PART_TOKENS = 4096
# Documents that wait for each worker, the one that it reads included.
_AHEAD = 2
# So often in a row workers may die over one document.
_ATTEMPTS = 5
_LOOK_S = 0.5


@dataclass(frozen=True)
class Part:
    """A stretch of a document as a worker has read it.

    Args:
        start: Its first token.
        ids: (1, n) int64.
        stored: (1, n) bool: which of them have pairs.
        pairs: Of each memory layer keys and values (1, G, m, D).
    """

    start: int
    ids: Packed
    stored: Packed
    pairs: dict[int, tuple[Packed, Packed]]


class Worker:
    """What runs in the process of one worker.

    Args:
        settings: The model.
        threads: That it computes with.
    """

    def __init__(self, settings: ModelSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._settings = settings
        self._lm: MemoryLM

    def ready(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Opens the model; says which versions run here, and which model."""
        # Pairs are kept here as the model makes them, for the time of a document.
        own = {"shards": None, "offload_dir": None, "capacity": None, "dtype": None}
        self._lm, _ = open_model(replace(self._settings, memory={**self._settings.memory, **own}))
        maker = self._lm.new_memory().fingerprint
        assert maker is not None
        return versions_here(), maker()

    def process(self) -> int:
        """Its number on its machine."""
        return os.getpid()

    def read(self, ids: Packed) -> list[Any]:
        """Reads a document of ids (n,) int64; gives references of its :class:`Part` s."""
        import ray

        memory = self._lm.ingest(unpack(ids)[None], self._lm.new_memory(), document="")
        (known,) = memory.log.find("")
        rows = memory.log.rows_of(known.number)
        _, positions = memory.log.locate(0, rows)
        parts = []
        for start in range(0, known.tokens, PART_TOKENS):
            stop = min(known.tokens, start + PART_TOKENS)
            mine = rows[(positions >= start) & (positions < stop)]
            stored = torch.zeros(1, stop - start, dtype=torch.bool)
            stored[0, positions[mine] - start] = True
            pairs = {
                number: (pack(layer.keys[:, :, mine]), pack(layer.values[:, :, mine]))
                for number, layer in memory.layers.items()
            }
            tokens = memory.log.tokens(known.number, start, stop)[None]
            parts.append(ray.put(Part(start, pack(tokens), pack(stored), pairs)))
        return parts


@dataclass
class Job:
    """A document that workers read.

    Args:
        ids: (n,) int64, all of it.
        worker: Who reads it.
        life: Which of the processes that the worker has had.
        reference: Its parts, as Ray names them.
    """

    ids: Tensor
    worker: int = 0
    life: int = 0
    reference: Any = None


@dataclass
class _Process:
    actor: Any
    life: int = 0
    jobs: list[Job] = field(default_factory=list)


class Workers:
    """Processes that read documents.

    Args:
        count: How many.
        settings: The model that each opens.
        address: Of a Ray cluster; None joins or starts one as shards do.
        fingerprint: Of the model here: theirs must be the same.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: The cluster cannot be joined or has no room, or workers have other versions or another model.
    """

    def __init__(self, count: int, settings: ModelSettings, address: str | None, fingerprint: dict[str, Any]) -> None:
        self._settings, self._fingerprint = settings, fingerprint
        self._room = ShardSettings(count, address)
        self._ray = engine.connect(address, SETTING)
        engine.refuse_without_room(self._ray, self._room, SETTING)
        self._processes: list[_Process] = []
        self.losses = 0
        """Workers that have died so far, and were started anew."""
        try:
            self._processes = [_Process(self._new_actor(number)) for number in range(count)]
            self._greet([process.actor for process in self._processes])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            engine.end(self._ray, process.actor)

    def _new_actor(self, number: int) -> Any:
        return engine.start(self._ray, Worker, self._room, number, self._settings, max(1, int(self._room.cpus)))

    def _greet(self, actors: Sequence[Any]) -> None:
        own = versions_here()
        references = [actor.ready.remote() for actor in actors]
        for versions, fingerprint in engine.wait_for(self._ray, references, "workers", SETTING):
            if versions != own:
                raise SettingError(SETTING, len(self._processes), f"one runs {versions}, and this process {own}",
                                   "Install the same versions everywhere.")  # fmt: skip
            if fingerprint != self._fingerprint:
                raise SettingError(SETTING, len(self._processes), "one has opened another model of that name",
                                   "Give all machines the same backbone.")  # fmt: skip

    def begin(self, ids: Tensor) -> Job:
        """Gives a document (n,) int64 to the worker that has least to read."""
        job = Job(ids)
        self._give(job)
        return job

    def _give(self, job: Job) -> None:
        left = [sum(len(one.ids) for one in process.jobs) for process in self._processes]
        job.worker = left.index(min(left))
        process = self._processes[job.worker]
        job.life = process.life
        process.jobs.append(job)
        job.reference = process.actor.read.remote(pack(job.ids))

    def parts(self, job: Job, meanwhile: Callable[[], None]) -> Iterator[Part]:
        """What was read of a document, in order and each part once, whoever dies over it.

        Args:
            job: As :meth:`begin` gave it.
            meanwhile: Called while this process waits.

        Raises:
            SettingError: Workers die again and again.
        """
        given = 0
        for _ in range(_ATTEMPTS):
            try:
                while not engine.wait(self._ray, [job.reference], 1, _LOOK_S):
                    meanwhile()
                for reference in engine.result(self._ray, job.reference)[given:]:
                    part: Part = engine.result(self._ray, reference)
                    given += 1
                    yield part
                self._processes[job.worker].jobs.remove(job)
                return
            except LostError as error:
                last = error
                self._revive(job.worker, job.life)
        raise self._dying(last)

    def _dying(self, error: Exception) -> SettingError:
        return SettingError(
            SETTING, len(self._processes), f"they have died {_ATTEMPTS} times in a row ({error})",
            "See what they ran short of: ray status, ray logs.",
        )  # fmt: skip

    def _revive(self, worker: int, life: int) -> None:
        """Starts a worker anew, and shares out what it had to read; unless that was done since ``life``."""
        process = self._processes[worker]
        if process.life != life:
            return
        last: Exception = LostError()
        for _ in range(_ATTEMPTS):
            self.losses += 1
            engine.end(self._ray, process.actor)
            process.actor, process.life = self._new_actor(worker), process.life + 1
            try:
                self._greet([process.actor])
                break
            except LostError as error:
                last = error
        else:
            raise self._dying(last)
        jobs, process.jobs = process.jobs, []
        for job in jobs:
            self._give(job)


class ParallelReader(Reader):
    """Reads documents by workers: see above. What it takes is what :class:`Reader` takes.

    Args:
        count: Workers.
        address: Of a Ray cluster; None joins or starts one.
    """

    def __init__(self, *args: Any, count: int, address: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        maker = self.lm.new_memory().fingerprint
        assert maker is not None
        self.workers = Workers(count, self.library.model, address, maker())
        self._ahead = count * _AHEAD
        self._coming: deque[Unread] = deque()
        self._jobs: dict[str, Job] = {}
        self._changed: set[str] = set()

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()

    def _prepare(self, unread: Sequence[Unread]) -> None:
        self._coming = deque(unread)
        self._begin()

    def _begin(self) -> None:
        while self._coming and len(self._jobs) < self._ahead:
            one = self._coming.popleft()
            try:
                self._begin_one_of(one)
            except ChangedError:
                self._changed.add(one.digest)

    def _begin_one_of(self, one: Unread) -> Job:
        pieces = [ids[0] for ids in self._parts(one, 0)]
        # What a document is read beside is its own beginning: who goes on with one reads it from there.
        job = self.workers.begin(torch.cat(pieces) if pieces else torch.zeros(0).long())
        self._jobs[one.digest] = job
        return job

    def _taken_in(self, unread: Unread, entry: Entry, start: int) -> Iterator[int]:
        if unread.digest in self._changed:
            raise ChangedError
        # One that was replaced together with another that has changed meanwhile is read again.
        job = self._jobs.get(unread.digest) or self._begin_one_of(unread)
        if not len(job.ids):
            self._jobs.pop(unread.digest)
            self._begin()
            return
        for part in self.workers.parts(job, self._check):
            # What the memory held of it before this command was begun.
            known = max(0, start - part.start)
            ids, stored = unpack(part.ids)[:, known:], unpack(part.stored)
            if not ids.shape[1]:
                continue
            pairs = int(stored[:, :known].sum())
            stored, device = stored[:, known:], self.memory.shape.device
            new = {
                number: (unpack(keys)[:, :, pairs:].to(device), unpack(values)[:, :, pairs:].to(device))
                for number, (keys, values) in part.pairs.items()
            }
            with self.memory.reading([entry.name]):
                self.memory.append(new, None, TokensRead(ids, torch.ones_like(stored), stored, [entry.name]))
            yield ids.shape[1]
            self._window_read(ids.shape[1])
        self._jobs.pop(unread.digest)
        self._begin()
