"""Reading text of a run into a memory of its own, and measuring the retriever on the real queries of what follows."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_fot.callbacks.budget import Budget
from lightning_fot.callbacks.stream import TextStream
from lightning_fot.config.retriever import retriever_label
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.by_position import quality_by_position
from lightning_fot.evaluation.measures.retrieval import measure_live, sample_rows
from lightning_fot.model.backbone.layers import evaluation_mode
from lightning_fot.training.module import FocusedTransformer

Row = dict[str, Any]


class RetrievalProbe(L.Callback):
    """Base of the retrieval callbacks: reads one stream of a run's text and measures on the window that follows it.

    The text is that of the batches' first pack (``packed``) or row (``paper``), which goes on from batch to batch; of
    several dataloaders the first counts. Up to ``tokens`` of it are read into a memory with the configured retriever;
    the queries of the next window then search it, once through the index and once exactly. Neither the model, its
    modes, random states nor the memory that validation itself uses is touched. Each rank measures its own text; what
    is logged is rank 0's. Several probes in one Trainer measure once, with the settings of the first.

    Validation and test measure their own text, after the pass over it, and log ``retrieval/...``. With
    ``every_n_steps``, training measures the newest text that it was trained on, and logs ``train/retrieval/...``
    straight to the loggers, whatever ``log_every_n_steps`` says.

    Within ``fit`` at most ``max_share`` of the time goes into measuring: a measurement that is not paid for yet is left
    out, and the end of training says how many were. The first is made on credit: a run too short to pay for it spends
    more, once. ``validate`` and ``test`` alone always measure.

    With both probes at their defaults and the sizes of ``configs/hnsw.yaml`` (SmolLM2-135M, batches of 1024 tokens, two
    cores), a measurement takes 14.6 s and a training step 2.6 s: 2 % of training pay for one in 285 steps. A model of a
    few layers (``configs/smoke.yaml``) trains a step in 12 ms beside 3.3 s: one in 14,000 steps; ``tokens`` is what to
    lower. There, with 2048 tokens and ``every_n_steps=1``, 100 s of training spent 1.92 % on measuring;
    ``benchmarks/callbacks.py`` measures it.

    Args:
        tokens: Tokens read into the memory for each measurement; about 0.55 forward passes each.
        queries: Queries measured for each layer and KV head.
        repeats: Timed calls; they are made only if speed is asked for.
        every_n_steps: Optimiser steps between measurements in training; 0 leaves training alone.
        max_share: Of the time of ``fit``; None measures every time.

    Attributes:
        rows: The last measurement, a row for each layer.
        left_out: Measurements that training had not paid for.

    Raises:
        SettingError: A value is out of its range.
    """

    fields: tuple[str, ...] = ()
    timed: bool = False
    by_position: bool = False

    def __init__(
        self,
        tokens: int = 8192,
        queries: int = 256,
        repeats: int = 20,
        every_n_steps: int = 0,
        max_share: float | None = 0.02,
    ) -> None:
        for name, value, least in (
            ("tokens", tokens, 1),
            ("queries", queries, 1),
            ("repeats", repeats, 1),
            ("every_n_steps", every_n_steps, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self._refuse(name, value, f"must be a whole number of at least {least}")
        if max_share is not None and (isinstance(max_share, bool) or not 0 < max_share <= 1):
            self._refuse("max_share", max_share, "must be above 0 and at most 1, or None")
        self.tokens = tokens
        self.queries = queries
        self.repeats = repeats
        self.every_n_steps = every_n_steps
        self.budget = Budget(max_share)
        self.rows: list[Row] = []
        self.left_out = 0
        self._evaluated = TextStream(tokens)
        self._trained = TextStream(tokens, newest=True)
        self._due = False
        self._step = -1

    def _refuse(self, name: str, value: object, problem: str) -> None:
        raise SettingError(f"{type(self).__name__}.{name}", value, problem, "Correct it.")

    def log_key(self, field: str, k: int) -> str:
        """Name under which a field is logged, without a layer."""
        return f"retrieval/{field}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses other modules, and sizes the text to whole windows."""
        if not isinstance(pl_module, FocusedTransformer):
            raise SettingError(
                "trainer.callbacks", type(self).__name__, f"cannot measure a {type(pl_module).__name__}",
                "Use it with a FocusedTransformer.",
            )  # fmt: skip
        window = pl_module.memory_config.window
        # The window behind what is read is the one measured: a window is not stored before it searches.
        most = (max(self.tokens // window, 1) + 1) * window
        self._evaluated, self._trained = TextStream(most), TextStream(most, newest=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.budget.start()
        self.left_out = 0
        # Resumed in the middle of accumulated batches, the step before is not measured again.
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch's first stream; measures if it is time to."""
        leader = self._leader(trainer)
        if not leader.every_n_steps:
            return
        step = trainer.global_step
        if leader is self:
            assert isinstance(pl_module, FocusedTransformer)
            self._trained.extend(batch["input_ids"], pl_module.crossbatch_config)
            fresh = step != self._step and step % self.every_n_steps == 0 and self._trained.full
            self._step = step
            self._due = fresh and self._allowed(trainer)
            if self._due:
                self.rows = self._measure(trainer, pl_module, self._trained.ids)
        if leader._due:
            values = {f"train/{name}": value for name, value in self._values(leader.rows).items()}
            for logger in trainer.loggers:
                # As Lightning numbers what a training step logs.
                logger.log_metrics(values, step=step - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says what was left out."""
        if self.left_out:
            rank_zero_info(
                f"{type(self).__name__} left out {self.left_out} measurements to stay within {self.budget.share:.1%} "
                "of the time: set max_share for more, or tokens for cheaper ones."
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts with no text."""
        self.rows = []
        self._evaluated.clear()
        if self._leader(trainer) is self:
            self._due = not trainer.sanity_checking and self._allowed(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the batch's first stream, as long as there is room."""
        if self._due and dataloader_idx == 0:
            assert isinstance(pl_module, FocusedTransformer)
            self._evaluated.extend(batch["input_ids"], pl_module.crossbatch_config)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and logs."""
        leader = self._leader(trainer)
        if leader is self and self._due:
            assert isinstance(pl_module, FocusedTransformer)
            self.rows = self._measure(trainer, pl_module, self._evaluated.ids)
        # The leader comes first in the Trainer's list, so its rows are there.
        self.rows = leader.rows
        pl_module.log_dict(self._values(self.rows), rank_zero_only=True, batch_size=1)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _leader(self, trainer: L.Trainer) -> "RetrievalProbe":
        return self._probes(trainer)[0]

    def _probes(self, trainer: L.Trainer) -> "list[RetrievalProbe]":
        return [callback for callback in trainer.callbacks if isinstance(callback, RetrievalProbe)]  # type: ignore[attr-defined]

    def _allowed(self, trainer: L.Trainer) -> bool:
        """Whether a measurement is paid for."""
        allowed = self.budget.allows(trainer)
        self.left_out += not allowed
        return allowed

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: FocusedTransformer, ids: Tensor) -> list[Row]:
        lm = module.lm
        window = lm.config.window
        windows = ids.shape[1] // window
        if trainer.world_size > 1:
            windows = int(trainer.strategy.all_gather(torch.tensor(windows, device=module.device)).min())
        if not lm.memory_layers or windows < 2:
            return []
        probes = self._probes(trainer)
        read = (windows - 1) * window
        with (
            self.budget.measuring(),
            isolate_rng(),
            evaluation_mode(lm.model),
            trainer.precision_plugin.forward_context(),
        ):
            memory = lm.ingest(ids[:, :read], memory=lm.new_memory(1))
            memory.flush()
            with lm.record_queries() as recorded:
                # The copy takes the window; the memory that is measured stays as the window found it.
                lm.ingest(ids[:, read : read + window], memory=memory.snapshot())
            repeats = self.repeats if any(probe.timed for probe in probes) else 0
            label = retriever_label(lm.config.retriever)
            rows = []
            for number, layer in memory.layers.items():
                queries = recorded[number][0]
                row = measure_live(lm, number, layer, sample_rows(queries, self.queries), repeats)
                if any(probe.by_position for probe in probes):
                    found = quality_by_position(lm, number, layer, queries, window, self.queries)
                    row["positions"] = {place: quality.as_dict() for place, quality in found.items()}
                rows.append({"retriever": label, **row})
        return rows

    def _values(self, rows: list[Row]) -> dict[str, float]:
        """What is logged of a measurement: each field by layer and as the layers' mean."""
        if not rows:
            return {}
        logged = {"memory/tokens": float(rows[0]["memory_tokens"])}
        found: dict[str, list[float]] = {}
        for row in rows:
            for key, value in self._named(row).items():
                if value is not None:
                    logged[key.replace("/", f"/layer{row['layer']}/", 1)] = float(value)
                    found.setdefault(key, []).append(float(value))
        return logged | {key: sum(values) / len(values) for key, values in found.items()}

    def _named(self, row: Row) -> dict[str, float | None]:
        """A row's fields by the name under which they are logged, without a layer."""
        return {self.log_key(field, row["k"]): row.get(field) for field in self.fields}
