"""Ray: joined or started, asked for room, and what its errors mean."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_fot.config.memory import SHARDS, ProcessSettings, ShardSettings
from lightning_fot.errors import MissingLibraryError, SettingError

if TYPE_CHECKING:
    from types import ModuleType

_DISTRIBUTION = "lightning-fot"
# A cluster that is started here: no dashboard, and no more shared memory than what travels at once needs.
_STORE_BYTES = 512 << 20
_ENVIRONMENT = {
    # It tells its makers what it is used for, unless it is told not to.
    "RAY_USAGE_STATS_ENABLED": "0",
    # On a busy machine the seconds that it gives itself and its processes to start, 30 and 60, are too few.
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    # Whoever asks waits for the answer: no less of a busy machine for them than for this process (Ray: 15).
    "RAY_worker_niceness": "0",
    # Processes that nobody has asked for yet.
    "RAY_prestart_worker_first_driver": "0",
}
# So long a cluster may take to answer at its address: Ray itself waits for minutes.
_ANSWER_SECONDS = 10.0
# Whether this process has started the cluster, for itself alone: there, cores are shared and not reserved.
_ours = False
# So often Ray is interrupted while it waits: only then is it seen whether a signal has come.
_LOOK_S = 0.5
# So long a process that there is room for may take to start.
START_SECONDS = 300.0


class LostError(Exception):
    """A process has died, or cannot be reached."""


def check_installed(settings: ProcessSettings | None) -> None:
    """Checks that what processes of a cluster need is there, where there are to be any, without loading it.

    Raises:
        MissingLibraryError: Ray is not installed.
    """
    if settings is not None and find_spec("ray") is None:
        raise MissingLibraryError("ray", f"pip install '{_DISTRIBUTION}[ray]'", settings.section)


def library(setting: str = SHARDS) -> ModuleType:
    """Ray.

    Args:
        setting: What asks for it.

    Raises:
        MissingLibraryError: It is not installed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        reason = None if isinstance(error, ModuleNotFoundError) else str(error)
        raise MissingLibraryError("ray", f"pip install '{_DISTRIBUTION}[ray]'", setting, reason) from error
    found: ModuleType = ray
    return found


def connect(address: str | None, setting: str = SHARDS) -> ModuleType:
    """Joins a cluster, or starts one on this machine where no address is given and this process is in none.

    Args:
        address: Of the cluster; None starts one.
        setting: What asks for it.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingError: Nobody answers at the address, or this process is part of another cluster.
    """
    ray = library(setting)
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise SettingError(
                f"{setting}.address", address, f"is not that of the cluster which this process is part of ({joined})",
                "Leave it out, or begin in a new process.",
            )  # fmt: skip
        return ray
    given: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address is None:
        given |= {"address": "local", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    else:
        given |= {"address": address}
    global _ours
    try:
        _refuse_silent(address)
        ray.init(**given)
        _ours = address is None
    except Exception as error:
        said = str(error).strip().splitlines()
        raise SettingError(
            f"{setting}.address", address, f"cannot be joined ({said[0] if said else type(error).__name__})",
            "Start it there: ray start --head --port=6379, with the same version of Ray; or leave the address out.",
        ) from error  # fmt: skip
    return ray


def _refuse_silent(address: str | None) -> None:
    """Refuses an address at which nobody listens.

    Raises:
        OSError: Nobody does.
        ValueError: It is no address.
    """
    if address in (None, "auto", "local"):
        return
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or "//" in host:
        raise ValueError("it is not HOST:PORT, as `ray start --head` tells it")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def start(ray: Any, cls: type, settings: ShardSettings, number: int, *args: Any) -> Any:
    """A process of its own that holds an instance of ``cls(*args)``; it may still have to start.

    Args:
        ray: As :func:`connect` gave it.
        cls: Whose methods can be called there.
        settings: What it reserves.
        number: Its number among those of one name.
        *args: Of ``cls``.

    Raises:
        SettingError: Another job has the name.
    """
    options = {**reserved(settings), "max_restarts": 0, "max_task_retries": 0}
    if settings.name is not None:
        options |= {"name": f"{settings.name}-{number}", "namespace": _DISTRIBUTION}
    try:
        return ray.remote(cls).options(**options).remote(*args)
    except ValueError as error:
        if settings.name is None or "name" not in str(error):
            raise
        raise SettingError(
            f"{SHARDS}.name", settings.name, "is that of another job, which has shards in this cluster",
            "Choose another name, or end that job.",
        ) from error  # fmt: skip


# What a process may reserve: its setting, how Ray calls it, how Ray's options do, and in which unit.
_RESOURCES = (
    ("cpus", "CPU", "num_cpus", 1),
    ("memory_mib", "memory", "memory", 1 << 20),
    ("gpus", "GPU", "num_gpus", 1),
)


def reserved(settings: ProcessSettings) -> dict[str, Any]:
    """Options of Ray by which a process or a task reserves what its settings say."""
    found = {option: (getattr(settings, name, None) or 0) * unit for name, _, option, unit in _RESOURCES}
    # Cores are always said: of those that are not, Ray reserves one.
    wanted: dict[str, Any] = {option: value for option, value in found.items() if value}
    return {**wanted, "num_cpus": 0 if _ours else settings.cpus}


def refuse_without_room(ray: Any, settings: ProcessSettings, setting: str = SHARDS) -> None:
    """Refuses processes that no machine of the cluster has free cores or memory for.

    Raises:
        SettingError: They do not fit.
    """
    free = ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    options = reserved(settings)
    for name, resource, option, unit in _RESOURCES:
        one, value = float(options.get(option, 0)), getattr(settings, name, None)
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if one > largest:
            raise SettingError(
                f"{setting}.{name}", value, f"is more than any machine of the cluster has ({largest / unit:,.0f})",
                "Ask for less, or add a machine.",
            )  # fmt: skip
        if one * settings.count > free.get(resource, 0.0):
            raise SettingError(
                f"{setting}.count", settings.count,
                f"processes of {name}={value} do not fit: {free.get(resource, 0.0) / unit:,.0f} of "
                f"{sum(node.get(resource, 0.0) for node in nodes) / unit:,.0f} are free in the cluster",
                "Take fewer or smaller ones, end other jobs, or add a machine.",
            )  # fmt: skip


def wait_for(ray: Any, references: Sequence[Any], what: str, setting: str = SHARDS) -> list[Any]:
    """Waits for processes to start and gives what each said first.

    Raises:
        SettingError: Some do not start.
        LostError: One has died.
    """
    waiting = len(references) - len(wait(ray, references, len(references), START_SECONDS))
    if waiting:
        raise SettingError(
            setting, len(references), f"{waiting} {what} did not start within {START_SECONDS:.0f} s",
            "See what the cluster waits for: ray status.",
        )  # fmt: skip
    return [result(ray, reference) for reference in references]


def wait(ray: Any, references: Sequence[Any], count: int, seconds: float) -> list[Any]:
    """Those of some calls that have ended, once ``count`` of them have, or after so many seconds."""
    ends = time.monotonic() + seconds
    while True:
        left = max(0.0, ends - time.monotonic())
        with _signals():
            ended = list(ray.wait(list(references), num_returns=count, timeout=min(left, _LOOK_S))[0])
        if len(ended) >= count or left <= _LOOK_S:
            return ended


@contextmanager
def _signals() -> Iterator[None]:
    """Passes on what handlers of signals raise: Ray waits to its end all the same, and hides it in its own error."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def result(ray: Any, reference: Any) -> Any:
    """What a call has given, once it has.

    Raises:
        LostError: The process has died, or cannot be reached.
        Exception: What went wrong there, as if it had been here.
    """
    from ray import exceptions

    try:
        while True:
            with suppress(exceptions.GetTimeoutError), _signals():
                return ray.get(reference, timeout=_LOOK_S)
    except exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):
            raise cause from None
        raise
    except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError) as error:
        raise LostError(str(error).strip().splitlines()[0]) from error


def end(ray: Any, actor: Any) -> None:
    """Ends a process that :func:`start` made; nothing happens where it is gone."""
    if ray.is_initialized():
        ray.kill(actor, no_restart=True)
