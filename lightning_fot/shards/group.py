"""The shards as this process knows them: what each holds for it, and how one that dies is made again.

This process keeps of each version how it came about: the newest pairs themselves, and of older ones the files that they
were saved in. A shard that dies is started anew and makes all its versions again; whoever was waiting for it asks anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakSet, finalize

from lightning_fot.config.memory import SHARDS, ShardSettings
from lightning_fot.errors import SettingError
from lightning_fot.shards import engine
from lightning_fot.shards.engine import LostError
from lightning_fot.shards.shard import Change, GoneError, MissingError, Shard, versions_here

# So often in a row a shard may die while it is made again.
_ATTEMPTS = 10


class Origin:
    """How a version came about, kept for as long as it, or one that was made of it, is held.

    Args:
        change: What made it.
        parent: Of what.
    """

    def __init__(self, change: Change, parent: Origin | None) -> None:
        self.change, self.parent = change, parent

    def rest_on(self, change: Change) -> None:
        """From now on it can be made in another way, such as from files; what it was made of is forgotten."""
        self.change, self.parent = change, None


class Version:
    """What one shard holds of a layer, as somebody here holds it; the shard lets go when nobody does.

    Args:
        group: The shards.
        shard: Which.
        origin: How it came about.
    """

    def __init__(self, group: Group, shard: int, origin: Origin) -> None:
        self.shard, self.origin = shard, origin
        self.number = origin.change.version
        group.hold(self)


@dataclass(frozen=True)
class Call:
    """A question to a shard, on its way.

    Args:
        shard: Which.
        method: Of :class:`Shard`.
        args: Of that.
        reference: Its answer, as Ray names it.
        life: Which of the processes that the shard has had was asked.
    """

    shard: int
    method: str
    args: tuple[Any, ...]
    reference: Any
    life: int


class Group:
    """Shards that hold memories of this process.

    Args:
        settings: How many, where, and what each reserves.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: The cluster cannot be joined, has no room, or runs other versions; or the name is taken.
    """

    def __init__(self, settings: ShardSettings) -> None:
        self.settings = settings
        self.count = settings.count
        self._ray = engine.connect(settings.address)
        engine.refuse_without_room(self._ray, settings)
        self._lock = RLock()
        self._numbers = itertools.count()
        self._held: list[WeakSet[Version]] = [WeakSet() for _ in range(self.count)]
        # Only ever added to and emptied: the garbage collector may come at any time, in any thread.
        self._gone: list[list[int]] = [[] for _ in range(self.count)]
        self._lives = [0] * self.count
        # Versions that could not be made again, and why.
        self._broken: dict[int, Exception] = {}
        self.losses = 0
        """Processes that have died so far, and were started anew."""
        self._actors: list[Any] = []
        try:
            for number in range(self.count):
                self._actors.append(self._new_actor(number))
            self._greet(range(self.count))
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether this process still is part of the cluster."""
        return bool(self._ray.is_initialized()) and bool(self._actors)

    def close(self) -> None:
        """Ends the shards; what they hold is lost."""
        for actor in self._actors:
            engine.end(self._ray, actor)
        self._actors = []

    def hold(self, version: Version) -> None:
        """Told of each version that is made."""
        self._held[version.shard].add(version)
        done = finalize(version, self._gone[version.shard].append, version.number)
        done.atexit = False

    def number(self) -> int:
        """A number that no other version or question has."""
        return next(self._numbers)

    def make(self, shard: int, parent: Version | None, name: str, *args: Any) -> tuple[Version, Future[bool]]:
        """Makes a version; whether it has come about the future says, and whether old vectors were coded anew."""
        before = None if parent is None else parent.origin
        change = Change(self.number(), None if parent is None else parent.number, name, args)
        version = Version(self, shard, Origin(change, before))
        call = self.ask(shard, "change", [change], self._taken(shard))
        return version, _Later(lambda: self._made(call))

    def _made(self, call: Call) -> bool:
        try:
            return bool(engine.result(self._ray, call.reference)[0])
        except LostError:
            # Made again with all others.
            self._revive(call.shard, call.life)
            return True
        except MissingError as error:
            raise self._lost(call.shard, self._broken.get(error.args[0], error)) from error

    def _taken(self, shard: int) -> list[int]:
        """Versions of a shard that nobody holds any more, once each."""
        gone = self._gone[shard]
        count = len(gone)
        taken = gone[:count]
        del gone[:count]
        return taken

    def ask(self, shard: int, method: str, *args: Any) -> Call:
        """Asks a shard; :meth:`answer` waits for it."""
        life = self._lives[shard]
        if self._gone[shard] and method != "change":
            self._actors[shard].let_go.remote(self._taken(shard))
        return Call(shard, method, args, getattr(self._actors[shard], method).remote(*args), life)

    def answer(self, call: Call) -> Any:
        """What a shard has answered; one that died is made again, and asked again.

        Raises:
            GoneError: The question was the second of two, and the shard that answered the first is no more.
            SettingError: The shard is lost.
        """
        for _ in range(_ATTEMPTS):
            try:
                return engine.result(self._ray, call.reference)
            except LostError as error:
                last = error
                self._revive(call.shard, call.life)
                call = self.ask(call.shard, call.method, *call.args)
            except MissingError as error:
                raise self._lost(call.shard, self._broken.get(error.args[0], error)) from error
        raise self._lost(call.shard, last)

    def answers(self, calls: Sequence[Call]) -> list[Any]:
        """Of several."""
        return [self.answer(call) for call in calls]

    def twice(self, asked: Callable[[], Any]) -> Any:
        """What a function of two calls gives, from the start again where a shard was lost between them."""
        for _ in range(_ATTEMPTS):
            try:
                return asked()
            except GoneError as error:
                last = error
        raise last

    def _new_actor(self, number: int) -> Any:
        limit = None if self.settings.memory_mib is None else self.settings.memory_mib << 20
        threads = max(1, int(self.settings.cpus))
        return engine.start(self._ray, Shard, self.settings, number, number, limit, threads)

    def _greet(self, numbers: Sequence[int]) -> None:
        """Waits until shards run, and refuses other versions than this process has."""
        own = versions_here()
        references = [self._actors[number].ready.remote() for number in numbers]
        for number, theirs in zip(numbers, engine.wait_for(self._ray, references, "shards"), strict=True):
            other = {name: version for name, version in theirs.items() if own[name] != version}
            if other:
                there = ", ".join(f"{name} {version}, not {own[name]}" for name, version in other.items())
                raise SettingError(
                    SHARDS, self.count, f"shard {number} runs with {there}", "Install the same versions everywhere."
                )

    def _revive(self, shard: int, life: int) -> None:
        """Starts a shard anew and makes all that is held of it, unless somebody has since ``life``.

        Raises:
            SettingError: It cannot be.
        """
        with self._lock:
            if self._lives[shard] != life:
                return
            last: Exception = LostError()
            for _ in range(_ATTEMPTS):
                self.losses += 1
                engine.end(self._ray, self._actors[shard])
                try:
                    self._actors[shard] = self._new_actor(shard)
                    self._greet([shard])
                    self._replay(shard)
                except LostError as error:
                    last = error
                    continue
                except (SettingError, OSError) as error:
                    last = error
                    break
                self._lives[shard] += 1
                return
            raise self._lost(shard, last) from last

    def _lost(self, shard: int, error: Exception) -> SettingError:
        return SettingError(
            SHARDS, self.count, f"shard {shard} is lost, and its pairs cannot be made again ({error})",
            "Load the memory from where it was saved last, or read its documents again: lightning ingest NAME PATH.",
        )  # fmt: skip

    def _replay(self, shard: int) -> None:
        """Makes all versions that are held of a shard, in the order in which they came about.

        One that cannot be made is told when it is asked for: others are not lost with it.
        """
        held = set(self._held[shard])
        self._gone[shard].clear()
        origins: dict[int, Origin] = {}
        children: dict[int, int] = {}
        for version in held:
            origin: Origin | None = version.origin
            while origin is not None and origin.change.version not in origins:
                origins[origin.change.version] = origin
                if origin.parent is not None:
                    parent = origin.parent.change.version
                    children[parent] = children.get(parent, 0) + 1
                origin = origin.parent
        wanted = {version.number for version in held}
        over: list[int] = []
        sent = []
        for number in sorted(origins):
            change = origins[number].change
            sent.append((number, self._actors[shard].change.remote([change], over)))
            over = []
            if change.parent is not None:
                children[change.parent] -= 1
                if not children[change.parent] and change.parent not in wanted:
                    over = [change.parent]
        for number, reference in sent:
            try:
                engine.result(self._ray, reference)
            except (SettingError, OSError) as error:
                self._broken[number] = error
            except MissingError as error:
                self._broken[number] = self._broken.get(error.args[0], error)

    def files_in_use(self, folder: str) -> set[str]:
        """Names of files of a folder that something held would be made of again."""
        found = set[str]()
        for held in self._held:
            seen = set[int]()
            for version in list(held):
                origin: Origin | None = version.origin
                while origin is not None and id(origin) not in seen:
                    seen.add(id(origin))
                    if origin.change.name == "load" and origin.change.args[2] == folder:
                        found |= {one["file"] for one in origin.change.args[3]}
                    origin = origin.parent
        return found


class _Later(Future[bool]):
    """What a function will give, asked when somebody wants to know."""

    def __init__(self, function: Callable[[], bool]) -> None:
        super().__init__()
        self._function: Callable[[], bool] | None = function

    def result(self, timeout: float | None = None) -> bool:
        """What it gives, or what it raises."""
        function, self._function = self._function, None
        if function is not None:
            try:
                self.set_result(function())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)


_GROUPS: dict[ShardSettings, Group] = {}
_LOCK = RLock()


def group_of(settings: ShardSettings) -> Group:
    """The shards of some settings; all memories of this process share them.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: They cannot be made.
    """
    with _LOCK:
        group = _GROUPS.get(settings)
        if group is None or not group.alive:
            group = _GROUPS[settings] = Group(settings)
        return group


def close_all() -> None:
    """Ends all shards of this process."""
    with _LOCK:
        for group in _GROUPS.values():
            group.close()
        _GROUPS.clear()
