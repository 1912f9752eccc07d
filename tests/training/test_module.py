"""FocusedTransformer in a real Trainer: what is trained, what is saved, what is refused."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, CrossbatchDataModule, FocusedTransformer, MemoryConfig
from lightning_fot.errors import SettingError
from tests.support.quiet_trainer import trainer

MEMORY = MemoryConfig(memory_layers=[1, 3], window=16, top_k=8)


def batches(count, layout="packed"):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 259, (4, 17), generator=generator)
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        if layout == "paper":
            batch["previous_ids"] = torch.randint(3, 259, (4, 1, 16), generator=generator)
            batch["previous_valid"] = torch.ones(4, 1, dtype=torch.bool)
        yield batch


def loader(count, layout="packed"):
    return DataLoader(list(batches(count, layout)), batch_size=None)


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestTraining:
    @pytest.mark.parametrize("layout", ["packed", "paper"])
    def test_only_memory_layers_move_and_only_they_are_saved(self, tmp_path, layout):
        module = FocusedTransformer("tiny-random-llama", MEMORY, CrossbatchConfig(layout=layout))
        module.configure_model()
        before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
        run = trainer(tmp_path)
        run.fit(module, loader(3, layout))
        moved = {name for name, value in module.backbone.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.startswith(("model.layers.1.", "model.layers.3.")) for name in moved)
        run.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        assert {name.removeprefix("backbone.") for name in saved} >= moved
        assert all(name.startswith(("backbone.model.layers.1.", "backbone.model.layers.3.")) for name in saved)

    def test_resumed_training_is_undisturbed_training(self, tmp_path):
        text = tmp_path / "text"
        text.mkdir()
        for number in range(4):
            (text / f"{number}.txt").write_text(" ".join(str(value * number) for value in range(900)))

        def data():
            return CrossbatchDataModule(
                paths=[str(text)], tokenizer="tiny-random-llama", window=16, cache_dir=str(tmp_path / "cache")
            )

        straight = FocusedTransformer("tiny-random-llama", MEMORY)
        trainer(tmp_path, max_steps=4).fit(straight, datamodule=data())
        run = trainer(tmp_path, max_steps=2)
        run.fit(FocusedTransformer("tiny-random-llama", MEMORY), datamodule=data())
        run.save_checkpoint(tmp_path / "half.ckpt")
        resumed = FocusedTransformer("tiny-random-llama", MEMORY)
        trainer(tmp_path, max_steps=4).fit(
            resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
        for name, value in straight.backbone.state_dict().items():
            assert torch.equal(value, resumed.backbone.state_dict()[name]), name

    def test_validation_reads_with_memory_and_leaves_training_alone(self, tmp_path):
        module = FocusedTransformer("tiny-random-llama", MEMORY)
        run = trainer(tmp_path, num_sanity_val_steps=0)
        metrics = run.validate(module, loader(2), verbose=False)
        assert metrics[0]["val/ppl"] == pytest.approx(math.exp(metrics[0]["val/loss"]), rel=1e-6)
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_validation_of_two_loaders_tells_them_apart(self, tmp_path):
        run = trainer(tmp_path, num_sanity_val_steps=0)
        module = FocusedTransformer("tiny-random-llama", MEMORY)
        one, two = loader(2), loader(1)
        run.validate(module, [one, two], verbose=False)
        both = {name: float(value) for name, value in run.callback_metrics.items()}
        for number, part in enumerate((one, two)):
            alone = run.validate(module, part, verbose=False)[0]
            assert both[f"val/loss/dataloader_idx_{number}"] == pytest.approx(alone["val/loss"], rel=1e-6)

    def test_a_loss_that_is_not_finite_stops_and_names_the_batch(self, tmp_path):
        module = FocusedTransformer("tiny-random-llama", MEMORY)
        module.configure_model()
        with torch.no_grad():
            module.backbone.lm_head.weight.fill_(torch.inf)
        with pytest.raises(SettingError, match=r"train/loss.*batch 0"):
            trainer(tmp_path).fit(module, loader(1))

    def test_a_checkpoint_of_other_layers_is_refused(self, tmp_path):
        run = trainer(tmp_path, max_steps=1)
        run.fit(FocusedTransformer("tiny-random-llama", MEMORY), loader(1))
        run.save_checkpoint(tmp_path / "a.ckpt")
        other = FocusedTransformer("tiny-random-llama", MemoryConfig(memory_layers=[2], window=16))
        with pytest.raises(SettingError, match="ckpt_path"):
            trainer(tmp_path).fit(other, loader(1), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("memory_layers", {"model.layers.1.", "model.layers.3."}),
        ("from_first_memory_layer", {"model.layers.1.", "model.layers.2.", "model.layers.3."}),
    ],
)
def test_what_is_trainable(trainable, trained):
    module = FocusedTransformer("tiny-random-llama", MEMORY, trainable=trainable)
    module.configure_model()
    names = [name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad]
    assert {name[: len("model.layers.0.")] for name in names} == trained


def test_the_attention_of_memory_layers_alone_is_trained():
    module = FocusedTransformer("tiny-random-llama", MEMORY, trainable="memory_attention")
    module.configure_model()
    names = {name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad}
    assert names == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (1, 3) for part in "qkvo"}


def test_the_model_is_not_there_before_it_is_configured():
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = FocusedTransformer("tiny-random-llama", MEMORY).lm


def test_a_checkpoint_alone_gives_the_module_back(tmp_path):
    made = FocusedTransformer("tiny-random-llama", MEMORY, trainable="memory_attention")
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, loader(1), loader(1))
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    again = FocusedTransformer.load_from_checkpoint(path)
    assert (again.backbone_name, again.memory_config) == ("tiny-random-llama", MEMORY)
    assert again.trainable == "memory_attention"
    trained = {name: part for name, part in made.named_parameters() if part.requires_grad}
    found = dict(again.named_parameters())
    assert trained
    assert all(torch.equal(part, found[name]) for name, part in trained.items())
    # What is given wins; a stranger's checkpoint names no class to import.
    given = FocusedTransformer.load_from_checkpoint(path, memory=MemoryConfig(memory_layers=[1, 3], window=32))
    assert given.memory_config.window == 32
    saved = torch.load(path, weights_only=True)
    saved["lightning_fot_settings"]["memory"]["retriever"] = "evil.Index"
    torch.save(saved, path)
    with pytest.raises(SettingError, match=r"evil\.Index.*name it yourself"):
        FocusedTransformer.load_from_checkpoint(path)
    with pytest.raises(SettingError, match=r"no prediction loop.*lm\.generate"):
        run.predict(made, loader(1))


def test_a_rate_that_is_no_number_is_refused(tmp_path):
    made = FocusedTransformer(
        "tiny-random-llama", MEMORY, optimizer=lambda params: torch.optim.SGD(params, lr=float("nan"))
    )
    with pytest.raises(SettingError, match="lr=nan"):
        trainer(tmp_path, max_steps=1).fit(made, loader(1), loader(1))
