"""``RetrievalSpeed``: what searching, adding and building cost, during training."""

from lightning_fot.callbacks.probe import RetrievalProbe


class RetrievalSpeed(RetrievalProbe):
    """Logs the speed of the configured retriever on real queries.

    Keys, for each memory layer (``retrieval/layer10/qps``) and as their mean (``retrieval/qps``): ``search_ms_p50``,
    ``search_ms_p95``, ``search_ms_p99`` of a call with ``queries`` queries for each KV head, ``qps``, ``add_s`` and
    ``build_s`` (for the whole memory), ``bytes`` (keys, values and index), ``rows_scanned`` (keys scored exactly for a
    query, of its bank), ``fallbacks`` (searches that the backend failed and exact search answered), ``rebuilds``; and
    ``memory/tokens``.

    When and at which cost it measures is said in :class:`~lightning_fot.callbacks.probe.RetrievalProbe`.

    Args:
        tokens: Tokens read into the memory for each measurement; about 0.55 forward passes each.
        queries: Queries of a call, for each layer and KV head.
        repeats: Timed calls; p99 needs 100 to be more than the slowest.
        every_n_steps: Optimiser steps between measurements in training; 0 measures at validation and test alone.
        max_share: Of the time of ``fit``; None measures every time.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[RetrievalSpeed(tokens=4096)], logger=False, accelerator="cpu")
    """

    fields = (
        "search_ms_p50",
        "search_ms_p95",
        "search_ms_p99",
        "qps",
        "add_s",
        "build_s",
        "bytes",
        "rows_scanned",
        "fallbacks",
        "rebuilds",
    )
    timed = True
