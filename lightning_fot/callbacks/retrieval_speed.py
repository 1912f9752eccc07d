"""``RetrievalSpeed``: what searching, adding and building cost, during training."""

from lightning_fot.callbacks.probe import RetrievalProbe


class RetrievalSpeed(RetrievalProbe):
    """Logs the speed of the configured retriever on real queries, after each validation.

    Keys, for each memory layer (``retrieval/layer10/qps``) and as their mean (``retrieval/qps``): ``search_ms_p50``,
    ``search_ms_p95``, ``search_ms_p99`` of a call with ``queries`` queries for each KV head, ``qps``, ``add_s`` and
    ``build_s`` (for the whole memory), ``bytes`` (keys, values and index), ``fallbacks`` (searches that the backend
    failed and exact search answered), ``rebuilds``; and ``memory/tokens``.

    Args:
        tokens: Tokens read into the memory in each validation; about 0.55 forward passes each.
        queries: Queries of a call, for each layer and KV head.
        repeats: Timed calls; p99 needs 100 to be more than the slowest.

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
        "fallbacks",
        "rebuilds",
    )

    def __init__(self, tokens: int = 8192, queries: int = 256, repeats: int = 20) -> None:
        super().__init__(tokens, queries, repeats)
