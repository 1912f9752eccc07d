"""Loading retrievers that others wrote: within a time limit, and first in a process of their own when only asked about.

Run as a module it is that process. It imports no torch in the process that asks.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import reduce
from importlib import import_module
from threading import Thread
from time import monotonic
from typing import IO, Any

from lightning_fot.config.retriever import COMMON_ARGUMENTS

LIMIT = "LIGHTNING_FOT_IMPORT_SECONDS"
_USUAL_SECONDS = 30.0
# For what comes before the plug-in: an interpreter that starts and imports torch, on a slow disk.
_START_SECONDS = 120.0
_ANSWER = "lightning-fot:"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lightning_fot.retrievers.plugins import main; main(sys.argv[2], float(sys.argv[3]))"
)


class ImportTimeoutError(TimeoutError):
    """A plug-in's module was still importing when its time was over."""


def import_seconds() -> float:
    """Seconds that a plug-in may take to import: ``LIGHTNING_FOT_IMPORT_SECONDS``, else 30."""
    try:
        seconds = float(os.environ.get(LIMIT, ""))
    except ValueError:
        return _USUAL_SECONDS
    return seconds if seconds > 0 else _USUAL_SECONDS


def load(target: str) -> Callable[..., Any]:
    """Import a class or factory, waiting no longer than :func:`import_seconds`.

    Args:
        target: ``package.module:attribute``, as in an entry point.

    Raises:
        ImportTimeoutError: Its module goes on importing. It is left to a thread that does not keep the program alive.
        ImportError: The module or one it needs is missing.
        AttributeError: The module has no such attribute.
        TypeError: It is neither a class nor a function.
        RuntimeError: Importing it tried to end the program.
    """
    # What an entry point may name beside it in brackets, optional dependencies, has no meaning here.
    module, _, attribute = target.partition("[")[0].replace(" ", "").partition(":")
    # Libraries with their own OpenMP crash or slow down when torch comes after them.
    import_module("torch")
    if module not in sys.modules:
        _import_within(module, import_seconds())
    found: object = reduce(getattr, filter(None, attribute.split(".")), import_module(module))
    if not callable(found):
        raise TypeError(f"{target} is not a class")
    return found


def _import_within(module: str, seconds: float) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            import_module(module)
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=work, name=f"import {module}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ImportTimeoutError(f"importing {module} takes more than {seconds:g} s")
    if raised and isinstance(raised[0], Exception):
        raise raised[0]
    if raised:
        raise RuntimeError(f"importing {module} raises {type(raised[0]).__name__}") from raised[0]


def try_out(targets: Sequence[str]) -> list[str | None]:
    """Import each target and make a small retriever with it, all at once, each in a process of its own.

    Args:
        targets: ``package.module:attribute``.

    Returns:
        For each why it cannot be used, or None.
    """
    seconds = import_seconds()
    running = []
    for target in targets:
        said, complained = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed in _answer
        command = [sys.executable, "-c", _CHILD, json.dumps([str(path) for path in sys.path]), target, str(seconds)]
        # Files, not pipes: a process that the plug-in leaves behind may hold a pipe open for ever.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=complained)
        running.append((child, said, complained))
    until = monotonic() + _START_SECONDS + seconds
    return [_answer(child, said, complained, until, seconds) for child, said, complained in running]


def _answer(
    child: subprocess.Popen[bytes], said: IO[bytes], complained: IO[bytes], until: float, seconds: float
) -> str | None:
    with said, complained:
        try:
            code = child.wait(max(0.1, until - monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"importing it takes more than {seconds:g} s"
        for file in (said, complained):
            file.seek(0)
        answers = [line for line in said.read().decode(errors="replace").splitlines() if line.startswith(_ANSWER)]
        trouble = complained.read().decode(errors="replace")
    if answers:
        reason: str | None = json.loads(answers[-1].removeprefix(_ANSWER))
        return reason
    if trouble.lstrip().startswith("Timeout (") or "\nTimeout (" in trouble:
        # The innermost frame first.
        place = re.search(r'File "([^"]+)", line (\d+)', trouble[trouble.index("Timeout (") :])
        where = f", at {os.path.basename(place[1])} line {place[2]}" if place else ""
        return f"importing it takes more than {seconds:g} s{where}"
    last = trouble.strip().rpartition("\n")[2]
    return f"importing it ended the process (code {code}{': ' + last if last else ''})"


def main(target: str, seconds: float) -> None:
    """Tries one target out and prints the answer; the process ends with it, whatever threads a plug-in has started."""
    from lightning_fot.retrievers.base import Retriever

    # A watchdog in C: it also ends what holds the interpreter's lock.
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        reason = what_is_wrong(load(target), Retriever)
    except BaseException as error:
        reason = describe(error)
    print(f"\n{_ANSWER}{json.dumps(reason)}", flush=True)
    os._exit(0)


def describe(error: BaseException) -> str:
    """An exception in a line."""
    try:
        text = str(error)
    except Exception:  # somebody else's class
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def what_is_wrong(maker: Any, kind: type) -> str | None:
    """Why a class or factory cannot serve as a retriever; None when it can.

    Args:
        maker: It is asked for an empty retriever of one bank of 64 coordinates, and that for an index.
        kind: The base class of retrievers.
    """
    name = getattr(maker, "__name__", "it")
    if isinstance(maker, type) and not issubclass(maker, kind):
        return f"{name} is not a subclass of {kind.__name__}"
    if inspect.isabstract(maker):
        return f"{name} does not implement {', '.join(sorted(maker.__abstractmethods__))}"
    known = constructor_arguments(maker)
    lacking = [argument for argument in COMMON_ARGUMENTS if known is not None and argument not in known]
    if isinstance(maker, type) and lacking:
        return f"{name} takes no {', '.join(lacking)}: hand **kwargs on to the base class"
    doing = f"{name}(dim=64, banks=1)"
    try:
        made = maker(dim=64, banks=1)
        if not isinstance(made, kind):
            return f"{name} makes a {type(made).__name__}, not a {kind.__name__}"
        if hasattr(made, "new_index"):
            # Where most plug-ins import their library.
            doing = "new_index"
            made.new_index(64)
    except ImportError as error:
        return str(error)
    except Exception as error:
        return f"{doing} raises {describe(error)}"
    return None


def constructor_arguments(maker: Callable[..., Any]) -> tuple[str, ...] | None:
    """Keyword arguments that a retriever class or factory takes beside ``dim`` and ``banks``.

    Args:
        maker: A class whose ``**kwargs`` go to its base class, or a function.

    Returns:
        Names, the class's own first; None when a function takes anything.
    """
    names: list[str] = []
    sources: list[Callable[..., Any]] = [maker]
    if isinstance(maker, type):
        sources = [base.__dict__["__init__"] for base in maker.__mro__ if "__init__" in base.__dict__]
    for source in sources:
        parameters = inspect.signature(source).parameters.values()
        for parameter in parameters:
            by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if by_name and parameter.name not in ("self", "dim", "banks", *names):
                names.append(parameter.name)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return tuple(names)
    return None
