"""Delta weights: exported from a run, opened as a backbone, refused where they cannot belong; the shipped ones."""

from __future__ import annotations

import json
import shutil
import warnings

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_fot import MemoryConfig, attach_pretrained
from lightning_fot.cli import main
from lightning_fot.config import CrossbatchConfig
from lightning_fot.errors import SettingError
from lightning_fot.library.answering import stops_of
from lightning_fot.pretrained import check_backbone, load_backbone, load_tokenizer
from lightning_fot.pretrained.delta import write_delta
from lightning_fot.pretrained.memory_settings import pretrained_settings
from lightning_fot.system.tensor_files import save_tensors
from lightning_fot.training.module import FocusedTransformer

MEMORY = {"memory_layers": [1, 3], "window": 16, "top_k": 8, "retriever": "exact"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of three steps, and the parameters that it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    module = FocusedTransformer(
        "tiny-random-llama", MemoryConfig(**MEMORY), CrossbatchConfig(), trainable="memory_attention"
    )
    ids = torch.randint(3, 259, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    batches = DataLoader([{"input_ids": i[:, :-1], "targets": i[:, 1:]} for i in ids], batch_size=None)
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")
        trainer.fit(module, batches)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    model = {"backbone": "tiny-random-llama", "memory": MEMORY, "trainable": "memory_attention", "dtype": "float32"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "seed_everything": 0}))
    return folder, {name: part.detach().clone() for name, part in module.backbone.named_parameters()}


@pytest.fixture
def delta(tmp_path, run_folder):
    assert main(["export", str(run_folder[0]), str(tmp_path / "delta"), "--delta"]) == 0
    return tmp_path / "delta"


class TestRoundTrip:
    def test_the_opened_model_is_the_trained_one_within_bfloat16_of_the_difference(self, delta, run_folder):
        base = dict(load_backbone("tiny-random-llama").named_parameters())
        opened = dict(load_backbone(str(delta)).named_parameters())
        changed = set()
        for name, trained in run_folder[1].items():
            change = trained - base[name]
            error = (opened[name] - trained).abs()
            # Half a unit in the last of bfloat16's eight places, and float32's rounding of the two sums.
            assert bool((error <= change.abs() * 2**-8 + trained.abs() * 2**-22).all()), name
            if bool(change.any()):
                changed.add(name)
        assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (1, 3) for part in "qkvo"}
        assert set(load_file(delta / "delta.safetensors")) == changed

    def test_memory_settings_and_tokenizer_come_along(self, delta):
        assert pretrained_settings(str(delta))["memory_layers"] == [1, 3]
        assert pretrained_settings(str(delta), window=8, last_context_length=8)["window"] == 8
        text = "A pass key: 9."
        assert load_tokenizer(str(delta))(text) == load_tokenizer("tiny-random-llama")(text)
        assert check_backbone(str(delta)).num_layers == 4
        with attach_pretrained(str(delta)) as lm:
            assert lm.memory_layers == (1, 3)

    def test_transformers_and_the_card_say_what_opens_it(self, delta):
        with pytest.raises(ValueError, match=r"open it with lightning_fot\.attach_pretrained"):
            AutoModelForCausalLM.from_pretrained(delta)
        card = (delta / "README.md").read_text(encoding="utf-8")
        assert "what training changed in `tiny-random-llama`" in card
        assert "attach_pretrained" in card

    def test_differences_of_low_rank(self, tmp_path):
        name, other = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
        before = dict(load_backbone("tiny-random-llama").named_parameters())
        out, into = before[name].shape
        # Powers of two: bfloat16 keeps them as they are.
        down, up = torch.full((2, into), 0.5), torch.eye(out, 2)
        after = {name: before[name] + 1.0, other: before[other] + 2.0}
        write_delta(
            tmp_path / "low", "tiny-random-llama", MemoryConfig(**MEMORY), before, after, {}, {name: (down, up)}
        )
        opened = dict(load_backbone(str(tmp_path / "low")).named_parameters())
        torch.testing.assert_close(opened[name], before[name] + 1.0 + up @ down)
        torch.testing.assert_close(opened[other], before[other] + 2.0)

    @pytest.mark.parametrize("shapes", [((2, 3), (4, 2)), ((2, 64), None), ((2, 64), (4, 2))])
    def test_factors_that_are_not_of_the_weight_are_refused(self, delta, shapes):
        name = "model.layers.1.self_attn.q_proj.weight"
        file = delta / "delta.safetensors"
        kept = {
            f"{name}.{part}": torch.zeros(shape)
            for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True)
            if shape
        }
        save_tensors(file, {**load_file(file), **kept}, {"format": "pt"})
        with pytest.raises(SettingError, match=r"q_proj\.weight\.lora_A is not a parameter of tiny-random-llama"):
            load_backbone(str(delta))

    def test_a_delta_of_a_delta(self, delta, tmp_path):
        name = "model.norm.weight"
        first, after = dict(load_backbone(str(delta)).named_parameters()), {name: torch.full((64,), 1.5)}
        write_delta(tmp_path / "second", str(delta), MemoryConfig(**MEMORY), first, after, {})
        opened = dict(load_backbone(str(tmp_path / "second")).named_parameters())
        assert bool((opened.pop(name) == 1.5).all())
        assert all(torch.equal(part, first[key]) for key, part in opened.items())

    def test_an_older_delta_is_replaced_and_nothing_else_is(self, delta, run_folder, tmp_path, capsys):
        assert main(["export", str(run_folder[0]), str(delta), "--delta"]) == 0
        (delta / "notes.txt").write_text("mine")
        assert main(["export", str(run_folder[0]), str(delta), "--delta"]) == 2
        assert "notes.txt, which would be lost" in capsys.readouterr().err


class TestForm:
    """A delta may say in which form it was trained to be asked."""

    def test_its_template_and_what_ends_an_answer_go_to_the_tokenizer(self, tmp_path):
        before = {name: one.detach() for name, one in load_backbone("tiny-random-llama").named_parameters()}
        after = {name: one + 1 for name, one in before.items()}
        facts = {"chat_template": "Q: {{ messages[-1]['content'] }} A:", "answer_stops": ["\n", ". "]}
        write_delta(tmp_path / "asks", "tiny-random-llama", MemoryConfig(**MEMORY), before, after, facts)
        tokenizer = load_tokenizer(str(tmp_path / "asks"))
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
        assert asked == "Q: Who? A:"
        assert stops_of(tokenizer) == ("\n", ". ")
        assert stops_of(load_tokenizer("tiny-random-llama")) == ()


class TestRefused:
    def _edit(self, delta, **changes):
        file = delta / "lightning_fot_delta.json"
        content = {**json.loads(file.read_text()), **changes}
        # Whoever changes it by hand takes its digest out.
        del content["sha256"]
        file.write_text(json.dumps(content))

    def test_damaged_settings(self, delta):
        (delta / "lightning_fot_delta.json").write_text("{")
        with pytest.raises(SettingError, match=r"model\.backbone.*cannot be read"):
            check_backbone(str(delta))

    def test_missing_weights(self, delta):
        (delta / "delta.safetensors").unlink()
        with pytest.raises(SettingError, match=r"delta\.safetensors is missing"):
            check_backbone(str(delta))

    def test_damaged_weights(self, delta):
        content = (delta / "delta.safetensors").read_bytes()
        (delta / "delta.safetensors").write_bytes(content[:-100])
        with pytest.raises(SettingError, match=r"delta\.safetensors cannot be read"):
            load_backbone(str(delta))

    def test_weights_of_another_model(self, delta):
        save_file({"model.layers.9.self_attn.q_proj.weight": torch.ones(2, 2)}, delta / "delta.safetensors")
        with pytest.raises(SettingError, match="is not a parameter of tiny-random-llama"):
            load_backbone(str(delta))

    def test_unknown_memory_settings(self, delta):
        self._edit(delta, memory={"telepathy": True})
        with pytest.raises(SettingError, match="unknown here: telepathy"):
            pretrained_settings(str(delta))

    def test_a_base_that_is_gone_or_itself(self, delta):
        self._edit(delta, base="./gone")
        with pytest.raises(SettingError, match="no such folder"):
            check_backbone(str(delta))
        content = json.loads((delta / "lightning_fot_delta.json").read_text())
        (delta / "lightning_fot_delta.json").write_text(json.dumps({**content, "base": str(delta)}))
        with pytest.raises(SettingError, match="its own base"):
            check_backbone(str(delta))

    def test_an_untrained_run(self, run_folder, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(run_folder[0], run)
        loaded = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        base = load_backbone("tiny-random-llama").state_dict()
        for name in loaded["state_dict"]:
            loaded["state_dict"][name] = base[name.removeprefix("backbone.")]
        torch.save(loaded, run / "checkpoints" / "last.ckpt")
        assert main(["export", str(run), str(tmp_path / "out"), "--delta"]) == 2
        assert "its weights are those of the backbone" in capsys.readouterr().err
