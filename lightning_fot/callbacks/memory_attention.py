"""``MemoryAttention``: how much attention goes to the memory, and whose keys it goes to, during training."""

from __future__ import annotations

from torch import Tensor

from lightning_fot.callbacks.sampled import SampledCallback, streams
from lightning_fot.evaluation.tasks.distraction import FIELDS, distraction, read_alone
from lightning_fot.training.module import FocusedTransformer


class MemoryAttention(SampledCallback):
    """Logs the attention on the memory, and the share of it that stays with the own document (the paper's r_d).

    The texts are those of the batch's streams: of each, the windows before the last are read on their own and share a
    memory with those of the other streams; the last window asks. Keys: ``memory/attention`` (of all attention, local
    context included, what goes to the memory), ``memory/own_share@d`` (r_d over all pairs of the memory; 1/d where
    documents are not told apart) and ``memory/own_share_found@d`` (the same of the pairs that were retrieved), where d
    is the number of streams, at most ``documents``. A batch of one stream has no others: it logs ``memory/attention``
    alone.

    Args:
        documents: Streams that share the memory at most.
        scored: Streams whose window asks.
        every_n_steps: Optimiser steps between measurements in training; 0 measures at validation and test alone.
        max_share: Of the time of ``fit``; None measures every time.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[MemoryAttention(documents=4)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, documents: int = 8, scored: int = 4, every_n_steps: int = 100, max_share: float | None = 0.02
    ) -> None:
        super().__init__(every_n_steps, max_share)
        self._check("documents", documents, 1)
        self._check("scored", scored, 1)
        self.documents = documents
        self.scored = scored

    def measure(self, module: FocusedTransformer, batch: dict[str, Tensor]) -> dict[str, float]:
        """Means over the streams that ask."""
        found = streams(batch, module.crossbatch_config)
        if found is None:
            return {}
        contexts, targets = found
        count = min(self.documents, len(contexts))
        alone = read_alone(module.lm, contexts[:count])
        row = distraction(module.lm, alone, list(targets.to(module.lm.device)), count, min(self.scored, count))
        share, found_share, mass = (sum(row[field]) / len(row[field]) for field in FIELDS)
        values = {"memory/attention": mass}
        if count > 1:
            values |= {f"memory/own_share@{count}": share, f"memory/own_share_found@{count}": found_share}
        return values
