"""Names of retrievers: the built-in ones and those of installed distributions. Imports no torch until one is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_fot.config.retriever import COMMON_ARGUMENTS, GROUP, SETTING, RetrieverSpec, check_value, layer_specs
from lightning_fot.errors import MissingLibraryError, SettingError, close_match
from lightning_fot.retrievers.plugins import LIMIT, ImportTimeoutError, constructor_arguments, describe, load, try_out

if TYPE_CHECKING:
    from lightning_fot.retrievers.base import Retriever

_MORE_TIME = f"Repair it, or give it more time by the variable {LIMIT}."


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
    "faiss_ivf": _Builtin("faiss_ivf", "FaissIVFRetriever", "faiss", "faiss-cpu", ("nlist", "nprobe", "index_dtype")),
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


def available_retrievers() -> dict[str, RetrieverInfo]:
    """All retrievers, built-in first. Nothing is imported into this process.

    The libraries of built-in ones are looked up. Plug-ins are tried out, at once and each in a process of its own: one
    that raises, crashes, hangs (30 s, or ``LIGHTNING_FOT_IMPORT_SECONDS``) or makes no retriever is listed as broken,
    with the reason.

    Returns:
        Name to what is known of it; broken ones never raise.
    """
    plugins = _plugins()
    errors = dict(zip(plugins, try_out([point.value for point in plugins.values()]), strict=True))
    found: dict[str, RetrieverInfo] = {}
    for name, builtin in _BUILTIN.items():
        missing = builtin.library is not None and find_spec(builtin.library) is None
        error = f"no module named {builtin.library!r}" if missing else None
        found[name] = RetrieverInfo(
            name,
            "built-in",
            _version(builtin.distribution or "lightning-fot"),
            error is None,
            error,
            builtin.install if error else None,
        )
    for name, point in plugins.items():
        error = errors[name]
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


def check_retriever(spec: RetrieverSpec) -> None:
    """Refuse a retriever setting that cannot work; for built-in names without importing anything.

    Args:
        spec: Name, ``{"name": name, **arguments}``, class path ``package.module.Class``, class or factory; or one of
            them for each layer, ``{"layers": {18: spec, 20: spec}}``.

    Raises:
        SettingError: Unknown name or argument (the valid ones are listed), or a value out of range.
        MissingLibraryError: The library behind it is not installed.
    """
    by_layer = layer_specs(spec)
    if by_layer is not None:
        for one in by_layer.values():
            if layer_specs(one) is not None:
                raise SettingError(f"{SETTING}.layers", one, "is by layer again", "Give each layer one retriever.")
            check_retriever(one)
        return
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


def create_retriever(spec: RetrieverSpec, dim: int, banks: int = 1, **kw: Any) -> Retriever:
    """Make a retriever.

    Args:
        spec: As for :func:`check_retriever`, of one layer.
        dim: Head size D.
        banks: Independent key sets.
        **kw: Further arguments; they win over those in ``spec``.

    Raises:
        SettingError: Unknown name or argument, or a value out of range.
        MissingLibraryError: The library behind it is not installed; or a plug-in lacks one.

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
    try:
        made = maker(dim=dim, banks=banks, **arguments)
    except (SettingError, MissingLibraryError):
        raise
    except Exception as error:
        raise SettingError(
            SETTING, spec, f"cannot be made ({describe(error)})", "Correct its arguments, or the retriever."
        ) from error
    if not isinstance(made, Retriever):
        raise SettingError(SETTING, spec, f"makes a {type(made).__name__}", "It must make a Retriever.")
    return made


def _split(spec: RetrieverSpec) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    if isinstance(spec, Mapping):
        if "layers" in spec:
            raise SettingError(SETTING, dict(spec), "is by layer, and no layer is meant here", "Give one retriever.")
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
            return load(point.value)
        except ImportError as error:
            library = error.name or point.value.partition(":")[0]
            raise MissingLibraryError(
                library, f"pip install --force-reinstall {source}", f"{SETTING}={name}", str(error)
            ) from error
        except ImportTimeoutError as error:
            raise SettingError(SETTING, name, f"the plug-in {source} hangs ({error})", _MORE_TIME) from error
        except Exception as error:
            raise SettingError(
                SETTING, name, f"the plug-in {source} fails to load ({describe(error)})", "Repair or remove it."
            ) from error
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            return load(f"{module}:{attribute}")
        except ImportTimeoutError as error:
            raise SettingError(SETTING, name, f"hangs ({error})", _MORE_TIME) from error
        except Exception as error:
            raise SettingError(
                SETTING, name, f"cannot be imported ({describe(error)})", "Check the class path."
            ) from error
    hint = close_match(name, [*_BUILTIN, *plugins])
    raise SettingError(SETTING, name, "is not an installed retriever", f"{hint}Installed: {_names()}.")


def _check_arguments(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    known = constructor_arguments(maker)
    if known is not None:
        _refuse_unknown(getattr(maker, "__name__", "retriever"), arguments, known)


def _refuse_unknown(name: str, arguments: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for argument, value in arguments.items():
        if argument not in known:
            hint = close_match(argument, known)
            raise SettingError(
                f"{SETTING}.{argument}", value, f"is not an argument of {name}", f"{hint}It has: {', '.join(known)}."
            )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
