"""How many contexts rows are shown over time: on every rank and after resuming the same (invariant 25)."""

import os
import subprocess
import sys
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig
from lightning_fot.config.schedule import ScheduleConfig
from lightning_fot.errors import SettingError
from lightning_fot.model.attention.crossbatch import row_table


def test_values_change_at_their_steps():
    schedule = ScheduleConfig("step", [2, 8, 64], at=[3, 5])
    assert [schedule.count(step) for step in range(7)] == [2, 2, 2, 8, 8, 64, 64]
    assert ScheduleConfig("constant", [4]).count(10**9) == 4


def test_draws_are_a_function_of_seed_and_step():
    schedule = ScheduleConfig("draw", [2, 128], seed=5)
    drawn = [schedule.count(step) for step in range(2000)]
    assert set(drawn) == {2, 128}
    assert 0.45 < drawn.count(2) / 2000 < 0.55
    # Neighbouring steps are independent, and so are seeds.
    assert 0.45 < sum(a == b for a, b in pairwise(drawn)) / 1999 < 0.55
    other = [ScheduleConfig("draw", [2, 128], seed=6).count(step) for step in range(2000)]
    assert 0.45 < sum(a == b for a, b in zip(drawn, other, strict=True)) / 2000 < 0.55
    # Another process, as another rank is, whose hashes of strings differ.
    code = (
        "from lightning_fot.config.schedule import ScheduleConfig as S;"
        "print([S('draw', [2, 128], seed=5).count(n) for n in range(50)])"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == str(drawn[:50])


def test_stages_rise_when_the_metric_passes_the_mark_and_never_fall():
    schedule = ScheduleConfig("metric", [1, 16, 128], at=[0.9, 0.98], metric="val/accuracy")
    stage, seen = 0, []
    for value in (0.5, 0.9, 0.91, float("nan"), 0.2, 0.99, 0.1):
        stage = schedule.stage(stage, {"val/accuracy": torch.tensor(value)})
        seen.append(schedule.count(0, stage))
    assert seen == [1, 1, 16, 16, 16, 128, 128]
    assert schedule.stage(0, {"val/accuracy": 1.0}) == 2
    assert schedule.stage(0, {"train/loss": 1.0}) == 0
    below = ScheduleConfig("metric", [1, 2], at=[10.0], metric="val/ppl", passes="below")
    assert [below.stage(0, {"val/ppl": value}) for value in (10.0, 9.9)] == [0, 1]


def test_held_values_pass_one_mark_at_a_time():
    schedule = ScheduleConfig("metric", [1, 2, 4, 8], at=[0.98] * 3, metric="val/accuracy", hold=40)
    stage, since, counts = 0, 0, []
    for step in range(200):
        passed = schedule.stage(stage, {"val/accuracy": 0.99 if step >= 50 else 0.5}, step - since)
        stage, since = passed, step if passed != stage else since
        counts.append(schedule.count(step, stage))
    assert counts == [1] * 50 + [2] * 40 + [4] * 40 + [8] * 70
    with pytest.raises(SettingError, match="hold=5: has no use with kind step"):
        ScheduleConfig("step", [1, 2], at=[5], hold=5)
    with pytest.raises(SettingError, match="hold=-1"):
        ScheduleConfig("metric", [1, 2], at=[5], metric="val/ppl", hold=-1)


def test_a_metric_that_validation_does_not_log_is_named():
    schedule = ScheduleConfig("metric", [1, 2], at=[0.9], metric="val/acuracy")
    with pytest.raises(SettingError, match=r"val/acuracy.*not logged.*val/accuracy"):
        schedule.stage(0, {"val/accuracy": 0.5})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "steps"}, "schedule.kind"),
        ({"kind": "step", "values": [1, 2]}, "schedule.at"),
        ({"kind": "step", "values": [1, 2, 3], "at": [5, 5]}, "schedule.at"),
        ({"kind": "step", "values": [1, 2], "at": [1.5]}, "schedule.at"),
        ({"kind": "metric", "values": [1, 2], "at": [0.9]}, "schedule.metric"),
        ({"kind": "draw", "values": [1, 2], "metric": "val/ppl"}, "schedule.metric"),
        ({"kind": "draw", "values": []}, "schedule.values"),
        ({"kind": "draw", "values": [1.5]}, "schedule.values"),
        ({"kind": "constant", "values": [1, 2]}, "schedule.values"),
        ({"kind": "draw", "values": [1, 2], "seed": -1}, "schedule.seed"),
        ({"kind": "draw", "valeus": [1, 2]}, "schedule.valeus"),
        ({"kind": "draw", "values": [0, 2]}, "schedule.values"),
        (7, "model.crossbatch.schedule=7"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(SettingError, match=named):
        CrossbatchConfig(layout="paper", schedule=settings)


@pytest.mark.parametrize("kind", ["constant", "step", "metric", "draw"])
@pytest.mark.parametrize("layout", ["packed", "paper"])
def test_tables_of_every_kind_are_those_of_its_counts(layout, kind):
    extra = {"step": {"at": [1, 2]}, "metric": {"at": [1, 2], "metric": "val/ppl"}}.get(kind, {})
    config = CrossbatchConfig(
        layout=layout, schedule={"kind": kind, "values": [3, 1, 2][: 1 if kind == "constant" else 3], **extra}
    )
    for step in range(4):
        count = config.schedule.count(step, min(step, len(config.schedule.at)))
        fixed = CrossbatchConfig(layout=layout, d=max(count, 1), range=count)
        assert row_table(config, 8, count) == row_table(fixed, 8)


def test_the_largest_value_must_fit_the_batch_from_the_first_step_on():
    config = CrossbatchConfig(layout="paper", schedule=ScheduleConfig("step", [2, 64], at=[450_000]))
    with pytest.raises(SettingError, match=r"crossbatch\.d=64.*8 rows"):
        row_table(config, 8, config.schedule.count(0))
    assert row_table(config, 64, 2)[63] == [63, 0]


def test_recipes():
    three, seven = CrossbatchConfig.recipe("longllama-3b"), CrossbatchConfig.recipe("longllama-7b")

    def mixture(config):
        return [(sum(n >= 4 for n in seen), sum(n < 4 for n in seen)) for seen in row_table(config, 8)[4:]]

    assert mixture(three) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert mixture(seven) == [(0, 0), (1, 2), (2, 4), (3, 4)]
    assert CrossbatchConfig.recipe("pg19").schedule.count(450_000) == 64
    assert CrossbatchConfig.recipe("dictionary").schedule.count(0, 1) == 128
    assert CrossbatchConfig.recipe("mixed", w=2).w == 2
    with pytest.raises(SettingError, match="longllama-3b"):
        CrossbatchConfig.recipe("longllama-30b")


class Watch(L.Callback):
    """Notes what rows were shown, and logs a metric that passes 0.5 in the second validation."""

    def __init__(self):
        self.shown, self.validations = [], 0

    def state_dict(self):
        return {"validations": self.validations}

    def load_state_dict(self, state):
        self.validations = state["validations"]

    def on_train_batch_end(self, trainer, *_):
        self.shown.append(int(trainer.callback_metrics["train/shown_contexts"]))

    def on_validation_epoch_end(self, trainer, module):
        self.validations += 1
        module.log("val/progress", self.validations / 3)


def loader(count):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 259, (4, 17), generator=generator) for _ in range(count)]
    return DataLoader([{"input_ids": part[:, :-1], "targets": part[:, 1:]} for part in ids], batch_size=None)


def run(folder, schedule, steps, watch, ckpt=None, **changes):
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **{"val_check_interval": 2, "limit_val_batches": 1, **changes},
    )
    config = CrossbatchConfig(range=1, schedule=schedule)
    module = FocusedTransformer("tiny-random-llama", MemoryConfig(memory_layers=[1, 3], window=16, top_k=8), config)
    trainer.fit(module, loader(20), loader(1), ckpt_path=ckpt, weights_only=True)
    return trainer


# What follows depends on the step, not on the batches.
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
class TestTraining:
    @pytest.mark.slow
    def test_a_metric_switches_and_a_checkpoint_of_that_very_moment_knows(self, tmp_path):
        schedule = ScheduleConfig("metric", [1, 3], at=[0.5], metric="val/progress")
        straight = Watch()
        run(tmp_path, schedule, 6, straight)
        # Validations after steps 2 and 4 log 1/3 and 2/3.
        assert straight.shown == [1, 1, 1, 1, 3, 3]
        first, second = Watch(), Watch()
        run(tmp_path, schedule, 4, first).save_checkpoint(tmp_path / "half.ckpt")
        run(tmp_path, schedule, 6, second, ckpt=tmp_path / "half.ckpt")
        assert first.shown + second.shown == straight.shown

    @pytest.mark.slow
    @pytest.mark.parametrize("half", [3, 4, 5, 6, 7])
    def test_a_held_value_lasts_as_long_when_a_training_is_resumed_within(self, tmp_path, half):
        """The metric that a mark waits with is kept: the next validation may come after its time."""
        schedule = ScheduleConfig("metric", [1, 2, 3], at=[0.1, 0.1], metric="val/progress", hold=3)
        straight = Watch()
        run(tmp_path, schedule, 9, straight)
        assert straight.shown == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        first, second = Watch(), Watch()
        run(tmp_path, schedule, half, first).save_checkpoint(tmp_path / "half.ckpt")
        run(tmp_path, schedule, 9, second, ckpt=tmp_path / "half.ckpt", val_check_interval=20)
        assert first.shown + second.shown == straight.shown

    def test_draws_go_on_after_resuming_and_accumulated_batches_share_one(self, tmp_path):
        schedule = ScheduleConfig("draw", [0, 1, 2, 3], seed=1)
        settings = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "val_check_interval": None}
        first, second = Watch(), Watch()
        run(tmp_path, schedule, 2, first, **settings).save_checkpoint(tmp_path / "half.ckpt")
        run(tmp_path, schedule, 5, second, ckpt=tmp_path / "half.ckpt", **settings)
        assert first.shown + second.shown == [schedule.count(step) for step in range(5) for _ in range(2)]
