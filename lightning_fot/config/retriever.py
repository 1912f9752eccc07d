"""Arguments of the built-in retrievers and their bounds, without torch: checked before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from lightning_fot.errors import SettingError

SETTING = "model.memory.retriever"
# Entry points of this group are retrievers.
GROUP = "lightning_fot.retrievers"

# What stands for a retriever: a name, ``{"name": ..., **arguments}``, ``{"layers": {18: ..., 20: ...}}``, a class path,
# a class or a factory.
RetrieverSpec = str | Mapping[str, Any] | Callable[..., Any]

COMMON_ARGUMENTS = ("seed", "num_threads", "transform", "min_index_size", "build", "duplicate_distance")
_CHOICES = {"build": ("background", "blocking"), "index_dtype": ("float32", "float16", "int8")}

# Name -> (smallest, largest or None, None allowed). None means "sized by the backend".
_BOUNDS: dict[str, tuple[int, int | None, bool]] = {
    "dim": (1, None, False),
    "banks": (1, None, False),
    "seed": (0, 2**31 - 1, False),
    "num_threads": (0, 1024, False),
    "min_index_size": (0, None, False),
    "M": (2, 512, False),
    "ef_construction": (1, None, False),
    "ef_search": (1, None, False),
    "nlist": (1, None, True),
    "nprobe": (1, None, True),
    "num_leaves": (1, None, True),
    "num_leaves_to_search": (1, None, True),
    "reorder": (1, None, True),
}


@dataclass(frozen=True)
class TransformSpec:
    """Which score-preserving maps are put before an index (retrievers.md, section 2).

    Attributes:
        center: Subtract the keys' mean: shifts all scores of a query alike.
        query_power: p of the query-aware map: keys by M^p, queries by M^-p, with M = E[q q^T] of past queries.
        l2_augment: One more coordinate that gives all keys one norm, so that L2 order is inner-product order.
    """

    center: bool = False
    query_power: float = 0.0
    l2_augment: bool = False


def resolve_transform(transform: object, auto: TransformSpec) -> TransformSpec:
    """Read the ``transform`` argument.

    Args:
        transform: ``"auto"``, ``"none"`` or ``{"center": bool, "query_power": p, "l2_augment": bool}``.
        auto: What ``"auto"`` stands for.

    Raises:
        SettingError: It is none of these.
    """
    if isinstance(transform, TransformSpec):
        return transform
    if transform == "auto":
        return auto
    if transform == "none":
        return TransformSpec()
    setting = f"{SETTING}.transform"
    if not isinstance(transform, Mapping):
        raise SettingError(setting, transform, "is not known", "Use auto, none or {center, query_power, l2_augment}.")
    for name, value in transform.items():
        if name not in ("center", "query_power", "l2_augment"):
            raise SettingError(f"{setting}.{name}", value, "is not known", "Use center, query_power and l2_augment.")
        if name == "query_power":
            if not _is_share(value):
                raise SettingError(f"{setting}.{name}", value, "must lie between 0 and 1", "1/4 and 1/2 work well.")
        elif not isinstance(value, bool):
            raise SettingError(f"{setting}.{name}", value, "must be true or false", "Correct it.")
    return TransformSpec(**transform)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def check_value(name: str, value: Any, setting: str | None = None) -> None:
    """Check one argument of a built-in retriever; names without a rule pass.

    Args:
        name: Argument name, such as ``ef_search``.
        value: Its value.
        setting: Name to show in the error; the default is below ``model.memory.retriever``.

    Raises:
        SettingError: The value cannot work.
    """
    if name == "transform":
        resolve_transform(value, TransformSpec())
        return
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise SettingError(f"{SETTING}.{name}", value, "is not known", f"Use {' or '.join(_CHOICES[name])}.")
        return
    if name == "duplicate_distance":
        if value is not None and not _is_share(value):
            raise SettingError(f"{SETTING}.{name}", value, "must lie between 0 and 1", "0 turns it off; try 0.001.")
        return
    if name not in _BOUNDS:
        return
    low, high, optional = _BOUNDS[name]
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SettingError(setting or f"{SETTING}.{name}", value, f"must be a whole number {span}", "Correct it.")


NONE = "none"


EXACT = "exact"


# Keys a bank below which every retriever searches exactly, unless its specification says otherwise.
MIN_INDEX_SIZE = 16384


def retriever_label(spec: RetrieverSpec) -> str:
    """How a row of results calls a retriever given as name, ``{"name": …}``, class path or factory.

    Example:
        >>> retriever_label("hnsw"), retriever_label({"name": "package.module.MyIndex", "M": 8})
        ('hnsw', 'MyIndex')
        >>> retriever_label({"layers": {18: {"name": "scann"}, 20: "hnsw"}})
        'scann+hnsw'
    """
    by_layer = layer_specs(spec)
    if by_layer is not None:
        return "+".join(dict.fromkeys(retriever_label(by_layer[layer]) for layer in sorted(by_layer)))
    if isinstance(spec, Mapping):
        spec = spec.get("name", spec.get("class_path", "retriever"))
    if isinstance(spec, str):
        return spec.rpartition(".")[2]
    return str(getattr(spec, "__name__", type(spec).__name__))


def index_size(spec: RetrieverSpec) -> int:
    """Keys a bank from which a retriever given by ``spec`` builds an index; the first of its layers to have one."""
    by_layer = layer_specs(spec)
    if by_layer is not None:
        return min(index_size(one) for one in by_layer.values())
    given = spec.get("min_index_size") if isinstance(spec, Mapping) else None
    return MIN_INDEX_SIZE if given is None else int(given)


def layer_specs(spec: RetrieverSpec) -> dict[int, Any] | None:
    """The specifications of a retriever setting that has one a layer, ``{"layers": {18: spec, 20: spec}}``.

    Returns:
        By layer, counted from 0; None where the setting is one for all layers.

    Raises:
        SettingError: It is not of that form.
    """
    if not isinstance(spec, Mapping) or "layers" not in spec:
        return None
    layers, others = spec["layers"], [str(key) for key in spec if key != "layers"]
    if others:
        raise SettingError(f"{SETTING}.{others[0]}", spec[others[0]], "stands beside layers", "Write it in each layer.")
    if not isinstance(layers, Mapping) or not layers:
        raise SettingError(f"{SETTING}.layers", layers, "names no layer", "Write {18: hnsw, 20: {name: scann}}.")
    found: dict[int, Any] = {}
    for key, value in layers.items():
        # JSON and checkpoints make words of the numbers.
        if isinstance(key, bool) or not str(key).isdecimal():
            raise SettingError(f"{SETTING}.layers", key, "is no layer", "Write the layer's number, counted from 0.")
        found[int(key)] = value
    return found


def layer_spec(spec: RetrieverSpec, layer: int | None) -> Any:
    """The specification for one memory layer, of one for all layers or one a layer.

    Args:
        spec: As ``MemoryConfig.retriever``.
        layer: Layer, counted from 0; None for keys of an unknown one.

    Raises:
        SettingError: There are specifications by layer, and none for this one.
    """
    found = layer_specs(spec)
    if found is None:
        return spec
    if layer not in found:
        raise SettingError(
            f"{SETTING}.layers", sorted(found), f"lacks layer {layer}", "Name every memory layer, counted from 0."
        )
    return found[layer]


def check_named(spec: RetrieverSpec, where: str) -> None:
    """Refuses, in settings that somebody else may have written, a retriever given by its class path.

    To import it is to run its module. Names are those of built-in retrievers and of plug-ins that are installed.

    Args:
        spec: As ``MemoryConfig.retriever``.
        where: The file that names it.

    Raises:
        SettingError: It is a class path.
    """
    for one in (layer_specs(spec) or {0: spec}).values():
        name = one.get("name") if isinstance(one, Mapping) else one
        if isinstance(name, str) and "." in name and not entry_points(group=GROUP, name=name):
            raise SettingError(
                SETTING, name, f"is a class that {where} names, and importing it runs its code",
                f"If you trust it, name it yourself ({SETTING}={name}); else name another retriever.",
            )  # fmt: skip
