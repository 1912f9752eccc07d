"""``RetrievalRecall``: what the index finds of what attention looks for, during training."""

from lightning_fot.callbacks.probe import RetrievalProbe


class RetrievalRecall(RetrievalProbe):
    """Logs the quality of retrieval against a shadow exact search on real queries, after each validation.

    Keys, for each memory layer (``retrieval/layer10/recall@32``) and as their mean (``retrieval/recall@32``):
    ``recall@k`` (tie-safe), ``mass_recall`` (softmax mass found over that of the true k nearest), ``mass`` (over that
    of all keys in memory), ``sink_share`` (slots taken by the first token of a window), ``hub_share`` (slots taken by
    the most often found hundredth of the keys), ``indexed_share`` (0 while the memory is too small for an index:
    recall then is that of exact search); and ``memory/tokens``.

    Args:
        tokens: Tokens read into the memory in each validation; about 0.55 forward passes each.
        queries: Queries measured for each layer and KV head.
        repeats: Timed calls, for a :class:`~lightning_fot.callbacks.RetrievalSpeed` beside it.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[RetrievalRecall(tokens=4096)], logger=False, accelerator="cpu")
    """

    fields = ("recall", "mass_recall", "mass", "sink_share", "hub_share", "indexed_share")

    def __init__(self, tokens: int = 8192, queries: int = 256, repeats: int = 20) -> None:
        super().__init__(tokens, queries, repeats)

    def log_key(self, field: str, k: int) -> str:
        """``retrieval/recall@k`` says its k, the others only their name."""
        return f"retrieval/recall@{k}" if field == "recall" else super().log_key(field, k)
