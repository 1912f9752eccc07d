"""Names of retrievers: the built-in ones and those of installed distributions. Imports no torch until one is made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.retrievers.probe import why_broken
from lightning_fot.retrievers.settings import COMMON_ARGUMENTS, SETTING, check_value

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever

GROUP = "lightning_fot.retrievers"


@dataclass(frozen=True)
class _Builtin:
    module: str
    attribute: str
    library: str | None
    distribution: str | None
    arguments: tuple[str, ...]

    @property
    def install(self) -> str | None:
        return f"pip install {self.distribution}" if self.distribution else None


# The argument names are repeated here so that a typo is found without importing torch; a test compares them.
_BUILTIN = {
    "exact": _Builtin("exact", "ExactRetriever", None, None, ()),
    "faiss_ivf": _Builtin("faiss_ivf", "FaissIVFRetriever", "faiss", "faiss-cpu", ("nlist", "nprobe")),
    "hnsw": _Builtin("hnsw", "HNSWRetriever", "hnswlib", "hnswlib", ("M", "ef_construction", "ef_search")),
    "scann": _Builtin("scann", "ScannRetriever", "scann", "scann", ("num_leaves", "num_leaves_to_search", "reorder")),
}


@dataclass(frozen=True)
class RetrieverInfo:
    """One retriever that was found.

    Attributes:
        name: As written in ``model.memory.retriever``.
        source: ``built-in`` or the distribution that brings it.
        version: Version of the library behind a built-in, or of the distribution.
        importable: Whether it can be used, as far as was checked.
        error: Why not.
        install: The command that would help.
    """

    name: str
    source: str
    version: str | None
    importable: bool
    error: str | None
    install: str | None


def available_retrievers(load: bool = False) -> dict[str, RetrieverInfo]:
    """All retrievers, built-in first.

    Args:
        load: Import each for certainty. Without it nothing is imported: what a module needs is looked up only.

    Returns:
        Name to what is known of it; broken ones are listed with their error and never raise.
    """
    found: dict[str, RetrieverInfo] = {}
    for name, builtin in _BUILTIN.items():
        error = None
        if builtin.library is not None and find_spec(builtin.library) is None:
            error = f"no module named {builtin.library!r}"
        elif load:
            error = _import_error(import_module, builtin.library or "torch")
        found[name] = RetrieverInfo(
            name,
            "built-in",
            _version(builtin.distribution or "lightning-fot"),
            error is None,
            error,
            builtin.install if error else None,
        )
    for name, point in _plugins().items():
        error = _import_error(_load, point) if load else why_broken(point.module, point.attr)
        distribution = point.dist.name if point.dist else "unknown distribution"
        found[name] = RetrieverInfo(
            name,
            distribution,
            point.dist.version if point.dist else None,
            error is None,
            error,
            f"pip install --force-reinstall {distribution}" if error else None,
        )
    return found


def check_retriever(spec: Any) -> None:
    """Refuse a retriever setting that cannot work; for built-in names without importing anything.

    Args:
        spec: Name, ``{"name": name, **arguments}``, class path ``package.module.Class``, class or factory.

    Raises:
        SettingError: Unknown name or argument (the valid ones are listed), or a value out of range.
        MissingLibraryError: The library behind it is not installed.
    """
    target, arguments = _split(spec)
    if not isinstance(target, str):
        _check_arguments(target, arguments)
    elif target in _BUILTIN:
        builtin = _BUILTIN[target]
        _refuse_unknown(target, arguments, (*builtin.arguments, *COMMON_ARGUMENTS))
        for name, value in arguments.items():
            check_value(name, value)
        if builtin.library is not None and find_spec(builtin.library) is None:
            raise MissingLibraryError(builtin.library, builtin.install or "", f"{SETTING}={target}")
    else:
        _check_arguments(_resolve(target), arguments)


def create_retriever(spec: Any, dim: int, banks: int = 1, **kw: Any) -> Retriever:
    """Make a retriever.

    Args:
        spec: As for :func:`check_retriever`.
        dim: Head size D.
        banks: Independent key sets.
        **kw: Further arguments; they win over those in ``spec``.

    Raises:
        SettingError: Unknown name or argument, or a value out of range.
        MissingLibraryError: The library behind it is not installed.

    Example:
        >>> create_retriever("exact", dim=4, banks=2).banks
        2
    """
    from lightning_fot.retrievers.base import Retriever

    target, arguments = _split(spec)
    arguments.update(kw)
    check_retriever({"name": target, **arguments} if isinstance(target, str) else target)
    maker = _resolve(target) if isinstance(target, str) else target
    _check_arguments(maker, arguments)
    made = maker(dim=dim, banks=banks, **arguments)
    if not isinstance(made, Retriever):
        raise SettingError(SETTING, spec, f"makes a {type(made).__name__}", "It must make a Retriever.")
    return made


def _split(spec: Any) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    if isinstance(spec, Mapping):
        arguments = {str(key): value for key, value in spec.items()}
        if "name" not in arguments:
            raise SettingError(SETTING, dict(spec), "has no name", "Write {name: hnsw, M: 16}.")
        target = arguments.pop("name")
    else:
        target, arguments = spec, {}
    if not isinstance(target, str) and not callable(target):
        raise SettingError(SETTING, spec, "is not a retriever", f"Give one of these names: {_names()}.")
    return target, arguments


def _names() -> str:
    return ", ".join([*_BUILTIN, *(name for name in _plugins())])


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in _BUILTIN:
            source = point.dist.name if point.dist else point.value
            warnings.warn(f"retriever {point.name!r} of {source} is hidden by the built-in one", stacklevel=3)
        else:
            found.setdefault(point.name, point)
    return found


def _resolve(name: str) -> Callable[..., Any]:
    """The class behind a name or class path."""
    if name in _BUILTIN:
        builtin = _BUILTIN[name]
        return getattr(import_module(f"lightning_fot.retrievers.{builtin.module}"), builtin.attribute)  # type: ignore[no-any-return]
    plugins = _plugins()
    if name in plugins:
        point = plugins[name]
        source = point.dist.name if point.dist else point.value
        try:
            return _load(point)
        except ImportError as error:
            library = error.name or point.module
            raise MissingLibraryError(
                library, f"pip install --force-reinstall {source}", f"{SETTING}={name}", str(error)
            ) from error
        except Exception as error:
            raise SettingError(
                SETTING, name, f"the plug-in {source} fails to load ({error})", "Repair or remove it."
            ) from error
    module, _, attribute = name.rpartition(".")
    if module:
        _torch_first()
        try:
            return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            raise SettingError(SETTING, name, f"cannot be imported ({error})", "Check the class path.") from error
    close = get_close_matches(name, [*_BUILTIN, *plugins], n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise SettingError(SETTING, name, "is not an installed retriever", f"{hint}Installed: {_names()}.")


def _torch_first() -> None:
    # Libraries with their own OpenMP crash or slow down when torch comes after them.
    import_module("torch")


def _load(point: EntryPoint) -> Callable[..., Any]:
    _torch_first()
    loaded = point.load()
    if not callable(loaded):
        raise TypeError(f"{point.value} is not a class")
    return loaded  # type: ignore[no-any-return]


def _check_arguments(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    known = constructor_arguments(maker)
    if known is not None:
        _refuse_unknown(getattr(maker, "__name__", "retriever"), arguments, known)


def _refuse_unknown(name: str, arguments: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for argument, value in arguments.items():
        if argument not in known:
            close = get_close_matches(argument, known, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise SettingError(
                f"{SETTING}.{argument}", value, f"is not an argument of {name}", f"{hint}It has: {', '.join(known)}."
            )


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


def _import_error(load: Callable[..., object], what: object) -> str | None:
    try:
        load(what)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
