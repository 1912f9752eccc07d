"""Recall and speed of retrievers on given keys and queries, and the settings that suit them. Names load when used."""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.bench.measure import DEFAULT_QUERY_GRIDS as DEFAULT_QUERY_GRIDS
    from lightning_fot.bench.measure import BuiltRetriever as BuiltRetriever
    from lightning_fot.bench.measure import Scores as Scores
    from lightning_fot.bench.measure import Truth as Truth
    from lightning_fot.bench.measure import layer_of as layer_of
    from lightning_fot.bench.measure import load_metadata as load_metadata
    from lightning_fot.bench.measure import load_qk as load_qk
    from lightning_fot.bench.measure import measure_retriever as measure_retriever
    from lightning_fot.bench.measure import scale_of as scale_of
    from lightning_fot.bench.measure import softcap_of as softcap_of
    from lightning_fot.bench.measure import times as times

_HOME = {
    "BuiltRetriever": "measure",
    "DEFAULT_QUERY_GRIDS": "measure",
    "Scores": "measure",
    "Truth": "measure",
    "layer_of": "measure",
    "load_metadata": "measure",
    "load_qk": "measure",
    "measure_retriever": "measure",
    "scale_of": "measure",
    "softcap_of": "measure",
    "times": "measure",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
