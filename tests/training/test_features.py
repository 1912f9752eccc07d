"""What a FocusedTransformer can train, and how: against the same training without the feature, or plain arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, CrossbatchDataModule, FocusedTransformer, MemoryConfig
from lightning_fot.config import LoraSettings
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.crossbatch import row_table
from lightning_fot.pretrained import load_backbone
from lightning_fot.training.module import _mean_loss
from lightning_fot.training.opening import load_trained
from lightning_fot.training.parameters import load_adapter, merge_lora, save_adapter
from tests.support.quiet_trainer import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]
MEMORY = MemoryConfig(memory_layers=[1, 3], window=16, top_k=8)


def batches(count: int, rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (count * rows, 17), generator=generator)
    return [{"input_ids": part[:, :-1], "targets": part[:, 1:]} for part in ids.split(rows)]


def loader(found: list[dict[str, Tensor]]) -> DataLoader[Any]:
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def module(**settings: Any) -> FocusedTransformer:
    L.seed_everything(3, verbose=False)
    made = FocusedTransformer("tiny-random-llama", MEMORY, CrossbatchConfig(pack=2, range=1), **settings)
    made.configure_model()
    return made


def gradients(made: FocusedTransformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    made.zero_grad()
    table = row_table(made.crossbatch_config, len(batch["input_ids"]))
    _mean_loss(made.lm.crossbatch(batch["input_ids"], table), batch["targets"]).backward()
    return {name: part.grad.clone() for name, part in made.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("trainable", ["memory_layers", "all"])
@pytest.mark.parametrize("layout", ["packed", "paper"])
def test_gradient_checkpointing_changes_nothing(trainable, layout):
    found = []
    for checkpointing in (False, True):
        L.seed_everything(3, verbose=False)
        made = FocusedTransformer(
            "tiny-random-llama", MEMORY, CrossbatchConfig(layout=layout, pack=2, range=1), trainable=trainable,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        made.configure_model()
        made.train()
        checked = [layer.gradient_checkpointing for layer in made.backbone.model.layers]
        assert checked == [checkpointing] * 4
        batch = batches(1)[0]
        previous = batch["input_ids"].flip(0)[:, None], torch.ones(4, 1, dtype=torch.bool)
        extra = previous if layout == "paper" else ()
        logits = made.lm.crossbatch(batch["input_ids"], row_table(made.crossbatch_config, 4), *extra)
        _mean_loss(logits, batch["targets"]).backward()
        found.append({name: part.grad for name, part in made.named_parameters() if part.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, atol=1e-6, rtol=1e-5)


def test_what_lies_below_the_first_trained_block_has_no_graph():
    made = module(trainable="memory_layers")
    made.train()
    seen = {}
    layers = made.backbone.model.layers
    handles = [
        layer.register_forward_hook(lambda _, __, output, at=at: seen.__setitem__(at, output))
        for at, layer in enumerate(layers)
    ]
    gradients(made, batches(1)[0])
    for handle in handles:
        handle.remove()
    graphs = {at: (part[0] if isinstance(part, tuple) else part).requires_grad for at, part in seen.items()}
    assert graphs == {0: False, 1: True, 2: True, 3: True}


def test_accumulated_packs_give_the_gradient_of_one_batch():
    whole, halves = batches(1, rows=8)[0], batches(2, rows=4)
    made = module(trainable="all")
    made.eval()
    # Without stepping, and seen only within the pack: what rows see does not depend on the batch they are in.
    made.crossbatch_config = CrossbatchConfig(pack=4, range=1, stepping=True)
    first, second = (gradients(made, half) for half in halves)
    table = [
        row for half in (0, 4) for row in [[r + half for r in rows] for rows in row_table(made.crossbatch_config, 4)]
    ]
    made.zero_grad()
    _mean_loss(made.lm.crossbatch(whole["input_ids"], table), whole["targets"]).backward()
    for name, part in made.named_parameters():
        torch.testing.assert_close((first[name] + second[name]) / 2, part.grad, atol=1e-6, rtol=1e-4)


def test_accumulating_in_a_trainer_equals_the_mean_gradient(tmp_path):
    parts = batches(2)
    made = module(optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    made.eval()
    mean = {
        name: (a + b) / 2
        for (name, a), b in zip(gradients(made, parts[0]).items(), gradients(made, parts[1]).values(), strict=True)
    }
    made.zero_grad()
    before = {name: part.detach().clone() for name, part in made.named_parameters() if name in mean}
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=2).fit(made, loader(parts))
    for name, part in made.named_parameters():
        if name in mean:
            torch.testing.assert_close(part.detach(), before[name] - 0.5 * mean[name], atol=1e-6, rtol=1e-4)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    made = module()
    before = copy.deepcopy(made.state_dict())
    weight = made.backbone.model.layers[3].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(SettingError, match="not finite in optimiser step 0"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(made, loader(batches(3)))
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_the_guilty_gradient_is_named_and_large_ones_are_finite(tmp_path):
    made = module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    layers = made.backbone.model.layers
    # Its sum, and its square, are beyond what fp32 holds.
    layers[1].mlp.down_proj.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e38))
    trainer(tmp_path, max_steps=1).fit(made, loader(batches(1)))
    layers[3].mlp.down_proj.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(2), torch.inf))
    with pytest.raises(SettingError, match=r"train/gradients='backbone.model.layers.3.mlp.down_proj.weight'"):
        trainer(tmp_path, max_steps=1).fit(made, loader(batches(1)))


def test_a_batch_without_targets_changes_nothing(tmp_path):
    without = {"input_ids": batches(1)[0]["input_ids"], "targets": torch.full((4, 16), -100)}
    made = module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    before = copy.deepcopy(made.state_dict())
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, loader([without]))
    assert "train/loss" not in run.callback_metrics
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name
    # With one of each to a step, the step is half of the other's gradient.
    (batch,) = batches(1)
    made, plain = (module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0)) for _ in range(2))
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=2).fit(made, loader([without, batch]))
    gradient = gradients(plain, batch)
    for name, value in made.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.detach(), before[name] - 0.5 * gradient[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_trains_and_validates(tmp_path, precision):
    made = module(gradient_checkpointing=True)
    run = trainer(tmp_path, precision=precision, max_steps=4, gradient_clip_val=1.0)
    run.fit(made, loader(batches(4)), loader(batches(1)))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert torch.isfinite(run.callback_metrics["val/loss"])
    weight = made.backbone.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_weight_averaging_averages_what_is_trained(tmp_path):
    made = module(optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    name = "backbone.model.layers.1.mlp.down_proj.weight"
    steps: list[Tensor] = [made.state_dict()[name].clone()]

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            steps.append(pl_module.state_dict()[name].clone())

    # The order matters: the weights are put in place at the end of training.
    run = trainer(tmp_path, max_steps=3, callbacks=[EMAWeightAveraging(decay=0.5), Steps()])
    run.fit(made, loader(batches(3)))
    average = steps[1]
    for later in steps[2:]:
        average = 0.5 * average + 0.5 * later
    torch.testing.assert_close(made.state_dict()[name], average)
    # What was averaged still reads with its memory.
    made.eval()
    assert torch.isfinite(made.lm(batches(1)[0]["input_ids"].reshape(1, -1)).logits).all()


def test_vectors_can_be_left_out_of_weight_decay(tmp_path):
    made = module(
        weight_decay_on="matrices", optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    )
    groups = made.configure_optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {part.dim() for part in groups[0]["params"]} == {2}
    assert {part.dim() for part in groups[1]["params"]} == {1}
    both = sum(part.numel() for group in groups for part in group["params"])
    assert both == sum(part.numel() for part in made.parameters() if part.requires_grad)


def test_a_scheduler_waits_for_the_validation_loss(tmp_path):
    made = module(
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor="val/loss", factor=0.1, patience=0, mode="max"
        ),
    )
    run = trainer(tmp_path, max_steps=-1, max_epochs=3)
    run.fit(made, loader(batches(2)), loader(batches(1)))
    # A loss that falls is no gain for mode=max: the rate falls after the second validation.
    assert run.optimizers[0].param_groups[0]["lr"] < 1.0
    nameless = module(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(SettingError, match="which metric"):
        nameless.configure_optimizers()


class Score(L.Callback):
    """Logs a metric of its own at each validation."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("custom/score", torch.tensor(1.0))


@pytest.mark.parametrize("monitor", ["val/loss", "val/accuracy", "custom/score"])
def test_a_scheduler_that_waits_is_advanced_after_each_validation_of_an_epoch(tmp_path, monitor):
    made = module(
        optimizer=lambda params: torch.optim.SGD(params, lr=1e-3),
        # No value is ever better than the first.
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor=monitor, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        ),
    )
    run = trainer(tmp_path, max_steps=6, val_check_interval=2, num_sanity_val_steps=1, callbacks=[Score()])
    run.fit(made, loader(batches(8)), loader(batches(1)))
    # Three validations: the first is the best.
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**2)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_a_metric_that_no_validation_logs_is_named(tmp_path):
    made = module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/bleu"))
    with pytest.raises(SettingError, match=r"lr_scheduler.*val/bleu.*val/loss"):
        trainer(tmp_path, val_check_interval=1).fit(made, loader(batches(3)), loader(batches(1)))


def test_clipping_accumulated_packs_is_clipping_their_mean_gradient(tmp_path):
    """The mean, its norm and the step by hand, in fp64."""
    parts, limit, rate = batches(3), 0.05, 0.5
    made = module(optimizer=lambda params: torch.optim.SGD(params, lr=rate))
    made.eval()
    each = [gradients(made, part) for part in parts]
    mean = {name: sum(found[name].double() for found in each) / len(parts) for name in each[0]}
    norm = float(sum(part.square().sum() for part in mean.values())) ** 0.5
    assert norm > 2 * limit
    before = {name: part.detach().double() for name, part in made.named_parameters() if name in mean}
    made.zero_grad()
    run = trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, gradient_clip_val=limit)
    run.fit(made, loader(parts))
    for name, part in made.named_parameters():
        if name in mean:
            moved = (part.detach().double() - before[name]) / -rate
            torch.testing.assert_close(moved, mean[name] * (limit / norm), atol=2e-7, rtol=1e-3)


def test_multi_doc_validation_keeps_the_memory_of_texts_before(tmp_path):
    texts = batches(3, rows=2)
    losses, accuracy = {}, {}
    for mode in ("single", "multi"):
        made = module(validation=mode)
        (found,) = trainer(tmp_path).validate(made, loader(texts), verbose=False)
        losses[mode], accuracy[mode] = found["val/loss"], found["val/accuracy"]
    made.eval()
    with torch.no_grad():
        alone = [made.lm(part["input_ids"].reshape(1, -1), labels=None) for part in texts]
        memory, after = None, []
        for part in texts:
            out = made.lm(part["input_ids"].reshape(1, -1), memory=memory)
            memory = out.memory
            after.append(out)
    for mode, outs in (("single", alone), ("multi", after)):
        expected = [
            torch.nn.functional.cross_entropy(out.logits[0], part["targets"].flatten())
            for out, part in zip(outs, texts, strict=True)
        ]
        assert losses[mode] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
        right = [out.logits[0].argmax(-1) == part["targets"].flatten() for out, part in zip(outs, texts, strict=True)]
        # What is no target counts in neither.
        wanted = torch.cat([part["targets"].flatten() for part in texts]) != -100
        assert accuracy[mode] == pytest.approx(float(torch.cat(right)[wanted].double().mean()), abs=1e-6)
    assert losses["single"] != pytest.approx(losses["multi"], abs=1e-6)


def test_validation_touches_nothing_of_the_training(tmp_path):
    states: list[Tensor] = []

    class Random(L.Callback):
        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            states.append(torch.get_rng_state())

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert torch.equal(states[-1], torch.get_rng_state())
            assert all(part.grad is None for part in pl_module.parameters())

    found = []
    for validations in (0, 2):
        made = module(validation="multi")
        run = trainer(
            tmp_path, max_steps=4, val_check_interval=1 if validations else None, limit_val_batches=validations,
            callbacks=[Random()],
        )  # fmt: skip
        run.fit(made, loader(batches(4)), loader(batches(2)))
        assert made.training
        found.append(made.state_dict())
    assert states
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class TestLora:
    pytest.importorskip("peft")
    settings = LoraSettings(rank=2, alpha=4.0, modules=["q_proj", "v_proj"])

    def test_a_fresh_adapter_is_the_model_and_only_adapters_are_trained(self):
        plain, made = module(), module(lora=self.settings)
        ids = batches(1)[0]["input_ids"].reshape(1, -1)
        plain.eval()
        made.eval()
        assert torch.equal(plain.lm(ids).logits, made.lm(ids).logits)
        trained = {name: part for name, part in made.named_parameters() if part.requires_grad}
        assert trained
        assert all(("lora_" in name and ".layers.1." in name) or ".layers.3." in name for name in trained)
        hidden = made.backbone.config.hidden_size
        assert sum(part.numel() for name, part in trained.items() if "layers.1.self_attn.q_proj" in name) == 4 * hidden

    def test_trained_saved_opened_and_merged(self, tmp_path):
        half = module(lora=self.settings)
        run = trainer(tmp_path, max_steps=2)
        run.fit(half, loader(batches(4)))
        run.save_checkpoint(tmp_path / "half.ckpt")
        saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
        assert saved
        assert all("lora_" in name for name in saved)
        opened = FocusedTransformer("tiny-random-llama", MEMORY)
        load_trained(opened, tmp_path / "half.ckpt")
        ids = batches(1)[0]["input_ids"].reshape(1, -1)
        opened.eval()
        half.eval()
        before = half.lm(ids).logits
        assert torch.equal(opened.lm(ids).logits, before)
        merge_lora(half.backbone)
        assert not [name for name in half.backbone.state_dict() if "lora" in name]
        torch.testing.assert_close(half.lm(ids).logits, before, atol=1e-5, rtol=1e-4)

    # peft 0.21 asks transformers under a name that is going.
    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    def test_adapters_are_files_that_peft_opens_beside_the_plain_backbone(self, tmp_path):
        from peft import PeftModel

        made = module(lora=self.settings)
        trainer(tmp_path, max_steps=2).fit(made, loader(batches(2)))
        made.eval()
        save_adapter(made.backbone, tmp_path / "adapter")
        text = batches(1)[0]["input_ids"].reshape(1, -1)
        expected = made.lm(text).logits
        again = module(lora=self.settings)
        again.eval()
        assert not torch.equal(again.lm(text).logits, expected)
        load_adapter(again.backbone, tmp_path / "adapter")
        # Read in four windows, each beside the memory of those before.
        assert torch.equal(again.lm(text).logits, expected)
        assert any(part.requires_grad for part in again.parameters())
        with made.lm:  # detached when it is left
            pass
        plain = PeftModel.from_pretrained(load_backbone("tiny-random-llama"), tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(text[:, :16]).logits, made.backbone(text[:, :16]).logits, atol=1e-5, rtol=0)

    def test_adapters_that_are_not_there_or_do_not_fit_are_refused(self, tmp_path):
        made = module(lora=self.settings)
        with pytest.raises(SettingError, match="no adapters"):
            save_adapter(module().backbone, tmp_path / "none")
        with pytest.raises(SettingError, match="adapter_model"):
            load_adapter(made.backbone, tmp_path)
        save_adapter(made.backbone, tmp_path / "two")
        with pytest.raises(SettingError, match="other blocks, modules or rank"):
            load_adapter(module(lora=LoraSettings(rank=3, modules=["q_proj", "v_proj"])).backbone, tmp_path / "two")

    def test_resumed_training_is_undisturbed_training(self, tmp_path):
        text = tmp_path / "text"
        text.mkdir()
        for number in range(4):
            (text / f"{number}.txt").write_text(" ".join(str(value * number) for value in range(900)))

        def data() -> CrossbatchDataModule:
            return CrossbatchDataModule(
                paths=[str(text)], tokenizer="tiny-random-llama", window=16, cache_dir=str(tmp_path / "cache")
            )

        def made() -> FocusedTransformer:
            L.seed_everything(3, verbose=False)
            return FocusedTransformer("tiny-random-llama", MEMORY, lora=self.settings)

        straight, half, resumed = made(), made(), made()
        L.seed_everything(3, verbose=False)
        trainer(tmp_path, max_steps=4).fit(straight, datamodule=data())
        L.seed_everything(3, verbose=False)
        run = trainer(tmp_path, max_steps=2)
        run.fit(half, datamodule=data())
        run.save_checkpoint(tmp_path / "half.ckpt")
        trainer(tmp_path, max_steps=4).fit(
            resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
        expected = {name: part for name, part in straight.named_parameters() if part.requires_grad}
        assert expected
        for name, part in resumed.named_parameters():
            if part.requires_grad:
                assert torch.equal(part, expected[name]), name

    def test_wrong_settings_are_named(self):
        with pytest.raises(SettingError, match="modules"):
            module(lora=LoraSettings(modules=["query"]))
        for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"modules": []}):
            with pytest.raises(SettingError, match=next(iter(wrong))):
                LoraSettings(**wrong)
