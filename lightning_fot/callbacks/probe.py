"""Reading validation text into a memory of its own, and measuring the retriever on the real queries of what follows."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fot.errors import SettingError
from lightning_fot.evaluation.plan import retriever_label
from lightning_fot.evaluation.retrieval import measure_live, sample_rows
from lightning_fot.memory import Memory
from lightning_fot.module import FocusedTransformer

Row = dict[str, Any]


class RetrievalProbe(L.Callback):
    """Base of the retrieval callbacks: reads one stream of the validation text and measures at its end.

    The text is that of the batch's first pack (``packed``) or row (``paper``), which goes on from batch to batch. Up to
    ``tokens`` of it are read into a memory with the configured retriever; the queries of the window that follows then
    search it, once through the index and once exactly. Neither the model, its mode, nor the memory that validation
    itself uses is touched. Several probes in one Trainer read the text once: the first does it for all.

    Args:
        tokens: Tokens read into the memory in each validation; about 0.55 forward passes each.
        queries: Queries measured for each layer and KV head.
        repeats: Timed calls.

    Raises:
        SettingError: A value is below 1.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, tokens: int = 8192, queries: int = 256, repeats: int = 20) -> None:
        for name, value in (("tokens", tokens), ("queries", queries), ("repeats", repeats)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                setting = f"{type(self).__name__}.{name}"
                raise SettingError(setting, value, "must be a whole number of at least 1", "Correct it.")
        self.tokens = tokens
        self.queries = queries
        self.repeats = repeats
        self.rows: list[Row] = []
        self._memory: Memory | None = None
        self._waiting: Tensor | None = None

    def log_key(self, field: str, k: int) -> str:
        """Name under which a field is logged, without a layer."""
        return f"retrieval/{field}"

    def _leads(self, trainer: L.Trainer) -> bool:
        return self._leader(trainer) is self

    def _leader(self, trainer: L.Trainer) -> "RetrievalProbe":
        probes = (callback for callback in trainer.callbacks if isinstance(callback, RetrievalProbe))  # type: ignore[attr-defined]
        return next(probes, self)

    def _begin(self) -> None:
        self.rows, self._memory, self._waiting = [], None, None

    @torch.no_grad()
    def _read(self, module: FocusedTransformer, batch: dict[str, Tensor]) -> None:
        lm = module.lm
        window = lm.config.window
        done = 0 if self._memory is None else int(self._memory.tokens_seen)
        room = max(self.tokens // window, 1) * window - done
        if not lm.memory_layers or room <= 0:
            return
        config = module.crossbatch_config
        rows = config.pack if config.layout == "packed" else 1
        text = batch["input_ids"][:rows].reshape(1, -1)
        text = text if self._waiting is None else torch.cat([self._waiting, text], dim=1)
        # The last window stays back: its queries are the ones measured, and a window is not stored before it searches.
        whole = min((text.shape[1] - window) // window * window, room)
        if whole > 0:
            self._memory = lm.new_memory(1) if self._memory is None else self._memory
            lm.ingest(text[:, :whole], memory=self._memory)
        self._waiting = text[:, max(whole, 0) :]

    @torch.no_grad()
    def _measure(self, module: FocusedTransformer) -> list[Row]:
        memory, waiting = self._memory, self._waiting
        self._begin()
        if memory is None or waiting is None:
            return []
        lm = module.lm
        memory.flush()
        with lm.record_queries() as recorded:
            # The copy takes the window; the memory that is measured stays as the window found it.
            lm.ingest(waiting[:, : lm.config.window], memory=memory.snapshot())
        label = retriever_label(lm.config.retriever)
        return [
            {
                "retriever": label,
                **measure_live(lm, number, layer, sample_rows(recorded[number][0], self.queries), self.repeats),
            }
            for number, layer in memory.layers.items()
        ]

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        leader = self._leader(trainer)
        if leader is self:
            assert isinstance(module, FocusedTransformer)
            self.rows = self._measure(module)
        # The leader comes first in the Trainer's list, so its rows are there.
        self.rows = leader.rows
        if not self.rows:
            return
        logged: dict[str, float] = {"memory/tokens": float(self.rows[0]["memory_tokens"])}
        for field in self.fields:
            values = {row["layer"]: float(row[field]) for row in self.rows if row[field] is not None}
            if values:
                key = self.log_key(field, self.rows[0]["k"])
                logged |= {key.replace("/", f"/layer{layer}/", 1): value for layer, value in values.items()}
                logged[key] = sum(values.values()) / len(values)
        # Each rank measures its own text; what is logged is rank 0's.
        module.log_dict(logged, rank_zero_only=True, batch_size=1)

    def _check(self, module: L.LightningModule) -> None:
        if not isinstance(module, FocusedTransformer):
            raise SettingError(
                "trainer.callbacks", type(self).__name__, f"cannot measure a {type(module).__name__}",
                "Use it with a FocusedTransformer.",
            )  # fmt: skip

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts with an empty memory."""
        self._check(pl_module)
        self._begin()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reads the batch's first stream, as long as there is room."""
        if self._leads(trainer) and not trainer.sanity_checking and dataloader_idx == 0:
            assert isinstance(pl_module, FocusedTransformer)
            self._read(pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and logs."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_end(trainer, pl_module)
