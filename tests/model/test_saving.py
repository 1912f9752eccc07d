"""Attached models as Hugging Face folders: opened without this package, with it, overwritten, interrupted, exported."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
import yaml
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.pretrained.memory_settings import pretrained_settings
from lightning_fot.retrievers import create_retriever
from tests.support.markdown_blocks import blocks
from tests.support.models import settings, tiny_llama, tokens

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def qwen():
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, tie_word_embeddings=True)).eval()


def bfloat16_llama():
    """Parameters in bfloat16, rotary frequencies in float32, as transformers has them."""
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


MODELS = {"llama": tiny_llama, "qwen3, tied": qwen, "bfloat16": bfloat16_llama}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of attached models, and the logits of their backbones before."""
    root, ids = tmp_path_factory.mktemp("models"), tokens(2, 24)
    expected = {}
    for name, make in MODELS.items():
        model = make()
        with torch.no_grad():
            expected[name] = model(ids).logits
        attach_memory(model, settings(dtype="bfloat16", memory_layers=[-1, 1], positions="none")).save_pretrained(
            root / name
        )
    return root, ids, expected


@pytest.mark.slow
def test_anyone_opens_the_folder_without_this_package(tmp_path, saved):
    root, ids, expected = saved
    torch.save(ids, tmp_path / "ids.pt")
    script = f"""
import sys
sys.modules["lightning_fot"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({torch.get_num_threads()})
ids = torch.load("ids.pt")
with torch.no_grad():
    for name in {list(MODELS)!r}:
        model = AutoModelForCausalLM.from_pretrained(r"{root}/" + name)
        torch.save(model(ids).logits, name + ".pt")
        print(type(model).__name__, model.config._attn_implementation)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["LlamaForCausalLM sdpa", "Qwen3ForCausalLM sdpa", "LlamaForCausalLM sdpa"]
    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), logits), name


def test_the_configuration_has_longllamas_names_and_nothing_of_the_attachment(saved):
    root, _, _ = saved
    config = json.loads((root / "qwen3, tied" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert (config["mem_layers"], config["mem_positionals"]) == ([1, 3], False)
    assert (config["mem_dtype"], config["last_context_length"]) == ("bfloat16", 16)
    assert "attach_pretrained" in config.pop("memory_hint")
    assert "lightning_fot" not in json.dumps(config)
    assert "attn_implementation" not in json.dumps(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_settings_and_logits_with_memory_come_back(saved, name):
    root, _, _ = saved
    config, ids = settings(dtype="bfloat16", memory_layers=[-1, 1], positions="none"), tokens(1, 60)
    weights = "bfloat16" if name == "bfloat16" else "float32"
    with attach_memory(MODELS[name](), config) as lm, torch.no_grad():
        expected = lm(ids)
        memory = lm.ingest(ids, lm.new_memory())
        memory.save(root / f"{name} memory")
        continued = lm(ids[:, :5], memory=memory).logits
    with attach_pretrained(str(root / name), weights) as lm, torch.no_grad():
        assert lm.config == config
        assert torch.equal(lm(ids).logits, expected.logits)
        # Its weights are known as those that made the memory.
        assert torch.equal(lm(ids[:, :5], memory=lm.load_memory(root / f"{name} memory")).logits, continued)
    with attach_pretrained(str(root / name), weights, top_k=2, memory_layers=[2]) as lm:
        assert (lm.memory_layers, lm.config.top_k, lm.config.positions) == ((2,), 2, "none")


def test_the_card_says_how_the_folder_is_opened_and_its_python_runs(tmp_path):
    config = settings(memory_layers=[1, 3])
    model = tiny_llama()
    model.config.name_or_path = str(tmp_path / "private")
    attach_memory(model, config).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-fot", "focused-transformer", "memory", "long-context"],
    }
    assert "private" not in text
    assert f"| `window` | `{config.window}` |" in body
    (block,) = blocks(body, "python")
    scope = {"document_ids": tokens(1, 60), "question_ids": tokens(1, 5)}
    exec(block.replace("FOLDER", str(tmp_path / "model")), scope)
    assert len(scope["memory"]) == 60
    # Edited, it does not keep the model from being opened.
    (tmp_path / "model" / "README.md").write_text("mine")
    attach_pretrained(str(tmp_path / "model")).detach()


def test_the_card_names_a_backbone_of_the_hub(tmp_path):
    model = tiny_llama()
    model.config.name_or_path = "someone/a-model"
    attach_memory(model, settings()).save_pretrained(tmp_path / "model")
    head = (tmp_path / "model" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1]
    assert yaml.safe_load(head)["base_model"] == "someone/a-model"


def test_every_setting_is_written(tmp_path):
    config = MemoryConfig(
        memory_layers=[1],
        window=20,
        top_k=3,
        retriever={"name": "hnsw", "M": 8},
        overlap=4,
        sink_tokens=2,
        skip_window_start=1,
        attending="gate",
        dtype="bfloat16",
        capacity=1000,
        last_context_length=7,
    )
    lm = attach_memory(tiny_llama(), config)
    lm.save_pretrained(tmp_path / "model")
    assert MemoryConfig(**pretrained_settings(str(tmp_path / "model"))) == config
    # A smaller window keeps what fits it.
    fitted = pretrained_settings(str(tmp_path / "model"), window=6)
    assert (fitted["window"], fitted["last_context_length"]) == (6, 6)


def test_places_on_this_machine_are_not_the_models(tmp_path):
    lm = attach_memory(tiny_llama(), settings(offload_dir=str(tmp_path), offload="all"))
    lm.save_pretrained(tmp_path / "model")
    found = MemoryConfig(**pretrained_settings(str(tmp_path / "model")))
    assert found == settings()


class TestGates:
    def write(self, folder):
        lm = attach_memory(tiny_llama(), settings(attending="gate"))
        with torch.no_grad():
            for number, gate in enumerate(lm.gates.values(), start=1):
                gate.copy_(torch.linspace(-number, number, len(gate)))
        lm.save_pretrained(folder)
        return lm

    def test_gates_come_back(self, tmp_path):
        lm, ids = self.write(tmp_path / "model"), tokens(1, 60)
        opened = attach_pretrained(str(tmp_path / "model"))
        with torch.no_grad():
            assert torch.equal(opened(ids).logits, lm(ids).logits)
            opened.gates["1"].zero_()
            assert not torch.equal(opened(ids).logits, lm(ids).logits)
        # For training, too; and a layer that had no gate starts with a new one.
        module = FocusedTransformer(str(tmp_path / "model"), settings(attending="gate", memory_layers=[2, 3]))
        module.configure_model()
        assert torch.equal(module.gates["3"], lm.gates["3"])
        assert not bool(module.gates["2"].any())

    def test_they_are_not_used_where_softmax_is_asked_for(self, tmp_path):
        self.write(tmp_path / "model")
        assert not len(attach_pretrained(str(tmp_path / "model"), integration="softmax").gates)

    @pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-9])])
    def test_damaged_gates_are_refused(self, tmp_path, damage):
        self.write(tmp_path / "model")
        damage(tmp_path / "model" / "lightning_fot_gates.safetensors")
        with pytest.raises(SettingError, match="gates"):
            attach_pretrained(str(tmp_path / "model"))


class TestSettingsFile:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", "cannot be read"),
            ("[]", "holds no JSON object"),
            ('{"format": 2, "memory": {}}', "is not format 1"),
            ('{"format": 1, "memory": {"window": 8, "depth": 3}}', "unknown here: depth"),
            ('{"format": 1, "memory": {"window": -8}}', "at least 1"),
        ],
    )
    def test_a_wrong_one_is_refused(self, tmp_path, text, reason):
        attach_memory(tiny_llama(), settings()).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "lightning_fot.json").write_text(text)
        with pytest.raises(SettingError, match=reason):
            attach_pretrained(str(tmp_path / "model"))


class TestTarget:
    def test_a_retriever_without_a_name_is_refused_before_anything_is_written(self, tmp_path):
        def factory(dim, banks, **keywords):
            return create_retriever("exact", dim, banks, **keywords)

        lm = attach_memory(tiny_llama(), settings(retriever=factory))
        with pytest.raises(SettingError, match="cannot name"):
            lm.save_pretrained(tmp_path / "model")
        assert names(tmp_path) == []
        lm.config.retriever = "exact"
        lm.save_pretrained(tmp_path / "model")

    def test_a_saved_model_is_replaced_as_a_whole(self, tmp_path):
        attach_memory(tiny_llama(seed=0), settings()).save_pretrained(tmp_path / "m", transformers.ByT5Tokenizer())
        before = names(tmp_path / "m")
        # Also while the new model's weights are those of the old files.
        with attach_pretrained(str(tmp_path / "m")) as lm, torch.no_grad():
            lm.model.lm_head.weight.mul_(2)
            lm.save_pretrained(tmp_path / "m", transformers.ByT5Tokenizer())
        assert names(tmp_path / "m") == before
        assert names(tmp_path) == ["m"]
        assert torch.equal(
            load_backbone(str(tmp_path / "m")).lm_head.weight, 2 * tiny_llama(seed=0).lm_head.weight.detach()
        )
        attach_memory(tiny_llama(seed=1), settings()).save_pretrained(tmp_path / "m")
        assert not any("token" in name for name in names(tmp_path / "m"))
        assert torch.equal(load_backbone(str(tmp_path / "m")).lm_head.weight, tiny_llama(seed=1).lm_head.weight)

    def test_an_empty_folder_and_a_link_to_one_are_filled(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        attach_memory(tiny_llama(), settings()).save_pretrained(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        load_backbone(str(tmp_path / "real"))

    def test_a_folder_that_holds_anything_else_is_left_alone(self, tmp_path):
        lm = attach_memory(tiny_llama(), settings())
        lm.save_pretrained(tmp_path / "model")
        # As it was written it is made anew; a card that somebody has worked on is theirs.
        lm.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "README.md").write_text("mine")
        with pytest.raises(SettingError, match=r"holds README\.md, which would be lost"):
            lm.save_pretrained(tmp_path / "model")
        # A model of someone else's, such as the backbone that was loaded.
        tiny_llama().save_pretrained(tmp_path / "plain")
        with pytest.raises(SettingError, match="holds config"):
            lm.save_pretrained(tmp_path / "plain")
        (tmp_path / "file").write_text("mine")
        for folder in (tmp_path / "file", tmp_path / "file" / "model"):
            with pytest.raises(SettingError, match="folder="):
                lm.save_pretrained(folder)
        assert names(tmp_path) == ["file", "model", "plain"]

    def test_an_interrupted_save_leaves_the_old_model(self, tmp_path):
        class Interrupted(transformers.ByT5Tokenizer):
            def save_pretrained(self, *args, **kwargs):
                raise KeyboardInterrupt

        attach_memory(tiny_llama(seed=0), settings()).save_pretrained(tmp_path / "model")
        for name in ("model", "new"):
            with pytest.raises(KeyboardInterrupt):
                attach_memory(tiny_llama(seed=1), settings()).save_pretrained(tmp_path / name, Interrupted())
        assert names(tmp_path) == ["model"]
        assert torch.equal(load_backbone(str(tmp_path / "model")).lm_head.weight, tiny_llama(seed=0).lm_head.weight)

    def test_a_detached_model_can_still_be_saved(self, tmp_path):
        lm = attach_memory(tiny_llama(), settings())
        lm.detach()
        lm.save_pretrained(tmp_path / "model")
        assert attach_pretrained(str(tmp_path / "model")).config == settings()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of three steps, and what its model says of a text."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    memory = {"memory_layers": [1, 3], "window": 16, "top_k": 8, "attending": {"name": "gate"}, "retriever": "exact"}
    module = FocusedTransformer("tiny-random-llama", MemoryConfig(**memory), CrossbatchConfig(), trainable="all")
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
    model = {"backbone": "tiny-random-llama", "memory": memory, "trainable": "all", "dtype": "float32"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "seed_everything": 0}))
    module.eval()
    with torch.no_grad():
        logits = module.lm(ids[0, :1].repeat(1, 3)).logits
    return folder, ids[0, :1].repeat(1, 3), logits


class TestExport:
    def test_the_trained_model_is_written_with_its_tokenizer(self, tmp_path, run_folder, capsys):
        folder, ids, expected = run_folder
        assert main(["export", str(folder), str(tmp_path / "out")]) == 0
        assert "Model after 3 steps" in capsys.readouterr().out
        with attach_pretrained(str(tmp_path / "out")) as lm, torch.no_grad():
            assert torch.equal(lm(ids).logits, expected)
            assert bool(lm.gates["1"].any())
        trained, untrained = (load_backbone(name) for name in (str(tmp_path / "out"), "tiny-random-llama"))
        assert not torch.equal(trained.lm_head.weight, untrained.lm_head.weight)
        text = "A pass key: 9."
        assert load_tokenizer(str(tmp_path / "out"))(text) == load_tokenizer("tiny-random-llama")(text)

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "RUN_FOLDER=None: is missing"),
            (["RUN"], "OUT=None: is missing"),
            (["RUN", "OUT", "--force"], "--force=None: is not an option of export"),
            (["RUN", "OUT", "--delta"], "has trained parameters of its own, which are no difference"),
            (["nowhere", "OUT"], "has no config.yaml of a run"),
            (["untrained", "OUT"], "has no checkpoints/last.ckpt"),
            (["RUN", "full"], "holds notes.txt, which would be lost"),
            (["lost", "OUT"], "no such folder"),
        ],
    )
    def test_what_cannot_be_exported_is_said(self, tmp_path, run_folder, capsys, words, reason):
        folder, _, _ = run_folder
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        for name in ("untrained", "lost"):
            (tmp_path / name).mkdir()
            shutil.copy(folder / "config.yaml", tmp_path / name)
        shutil.copytree(folder / "checkpoints", tmp_path / "lost" / "checkpoints")
        config = (tmp_path / "lost" / "config.yaml").read_text().replace("tiny-random-llama", "./gone")
        (tmp_path / "lost" / "config.yaml").write_text(config)
        places = {"RUN": folder, **{name: tmp_path / name for name in ("nowhere", "untrained", "lost", "full", "OUT")}}
        assert main(["export", *(str(places.get(word, word)) for word in words)]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "OUT").exists()
