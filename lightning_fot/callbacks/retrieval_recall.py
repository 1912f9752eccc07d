"""``RetrievalRecall``: what the index finds of what attention looks for, during training."""

from lightning_fot.callbacks.probe import RetrievalProbe, Row

POSITION_FIELDS = ("recall", "mass_recall", "mass")


class RetrievalRecall(RetrievalProbe):
    """Logs the quality of retrieval against a shadow exact search on real queries.

    Keys, for each memory layer (``retrieval/layer10/recall@32``) and as their mean (``retrieval/recall@32``):
    ``recall@k`` (tie-safe), ``mass_recall`` (softmax mass found over that of the true k nearest), ``mass`` (over that
    of all keys in memory), ``sink_share`` (slots taken by the first token of a window), ``hub_share`` (slots taken by
    the most often found hundredth of the keys), ``hub_skewness`` (of the k-occurrences; Radovanović et al. 2010),
    ``indexed_share`` (0 while the memory is too small for an index: recall then is that of exact search); and
    ``memory/tokens``. The first three also by the query's local position in its window, as
    ``retrieval/position16-63/recall@32``: buckets 0-15, 16-63, 64-255 and so on, with a like share of the queries each.

    When and at which cost it measures is said in :class:`~lightning_fot.callbacks.probe.RetrievalProbe`.

    Args:
        tokens: Tokens read into the memory for each measurement; about 0.55 forward passes each.
        queries: Queries measured for each layer and KV head.
        repeats: Timed calls, for a :class:`~lightning_fot.callbacks.RetrievalSpeed` beside it.
        every_n_steps: Optimiser steps between measurements in training; 0 measures at validation and test alone.
        max_share: Of the time of ``fit``; None measures every time.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[RetrievalRecall(tokens=4096)], logger=False, accelerator="cpu")
    """

    fields = ("recall", "mass_recall", "mass", "sink_share", "hub_share", "hub_skewness", "indexed_share")
    by_position = True

    def log_key(self, field: str, k: int) -> str:
        """``retrieval/recall@k`` says its k, the others only their name."""
        return f"retrieval/recall@{k}" if field == "recall" else super().log_key(field, k)

    def _named(self, row: Row) -> dict[str, float | None]:
        found = super()._named(row)
        for place, quality in row["positions"].items():
            for field in POSITION_FIELDS:
                key = self.log_key(field, row["k"]).replace("/", f"/position{place}/", 1)
                found[key] = quality[field]
        return found
