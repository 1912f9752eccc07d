"""LongLLaMA's checkpoints: loaded as plain Llama, with the memory that they name, and without their code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lightning_fot import MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.cli import main
from lightning_fot.commands.job.parsing import parse
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.pretrained import check_backbone, load_backbone, load_tokenizer
from lightning_fot.pretrained.longllama import memory_settings
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import read_request
from tests.support.models import tiny_llama, tokens
from tests.support.oracle import dense_logits

REPOSITORY = Path(__file__).parents[2]
WINDOW = 16
# As the released files have them, in the sizes of the tiny model; the code of `auto_map` is beside them.
CONFIG = {
    "architectures": ["LongLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_longllama.LongLlamaConfig",
        "AutoModel": "modeling_longllama.LongLlamaModel",
        "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "gradient_checkpoint_every_ith": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "last_context_length": 12,
    "max_position_embeddings": WINDOW,
    "mem_attention_grouping": [1, 2048],
    "mem_dtype": "float32",
    "mem_layers": [1, 3],
    "mem_positionals": True,
    "model_type": "longllama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_attention": False,
    "torch_dtype": "float32",
    "transformers_version": "4.33.2",
    "use_cache": True,
    "vocab_size": 101,
}
LEAVE_OUT = object()


def llama():
    """What the folders hold: all heads have keys of their own, as in LongLLaMA, and the theta of Code Llama."""
    return tiny_llama(kv_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})


def changed(**changes):
    config = CONFIG | changes
    return {key: value for key, value in config.items() if value is not LEAVE_OUT}


def write_folder(folder, model, safetensors=False, **changes):
    """A released checkpoint: weights in shards with the buffers of old versions, and code that fails when it is run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(changed(**changes)))
    for name in ("configuration_longllama", "modeling_longllama"):
        (folder / f"{name}.py").write_text("raise RuntimeError('remote code was run')\n")
    transformers.ByT5Tokenizer().save_pretrained(folder)
    weights = dict(model.state_dict())
    for layer in range(4):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), 7.0)
    if safetensors:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "long", llama())


@pytest.mark.parametrize(
    ("safetensors", "changes"),
    [
        (False, {}),
        (True, {}),
        (False, {"model_type": "llama"}),
        (True, {"architectures": LEAVE_OUT, "rms_norm_eps": LEAVE_OUT, "tie_word_embeddings": LEAVE_OUT}),
    ],
)
def test_it_loads_as_the_llama_that_its_weights_are(tmp_path, safetensors, changes):
    expected = llama()
    loaded = load_backbone(str(write_folder(tmp_path / "long", expected, safetensors, **changes)))
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())
    ids = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert loaded.config.model_type == "llama"
    assert not {"auto_map", "mem_layers", "mem_dtype", "last_context_length"} & set(loaded.config.to_dict())


def test_rotary_frequencies_keep_their_precision(folder):
    ids = tokens(1, 200)
    config = load_backbone(str(folder)).config
    expected = transformers.LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    for name in (str(folder), "tiny-random-llama"):
        model = load_backbone(name, "bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(load_backbone(str(folder), "bfloat16")(ids).logits, expected(ids).logits)


@pytest.mark.slow
def test_its_code_is_never_run_and_the_hub_is_read_as_a_folder(tmp_path, folder):
    snapshots = tmp_path / "hub" / "models--owner--long"
    write_folder(snapshots / "snapshots" / ("0" * 40), llama())
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("0" * 40)
    script = f"""
import sys
from lightning_fot.pretrained.memory_settings import pretrained_settings
assert pretrained_settings("owner/long") == pretrained_settings({str(folder)!r})
assert pretrained_settings("owner/long")["memory_layers"] == [1, 3]
assert "torch" not in sys.modules
from lightning_fot.pretrained import load_backbone, load_tokenizer
for name in ({str(folder)!r}, "owner/long"):
    assert type(load_backbone(name)).__name__ == "LlamaForCausalLM"
    assert len(load_tokenizer(name)("abc").input_ids) == 4
assert not any("longllama" in name for name in sys.modules if not name.startswith("lightning_fot"))
print("loaded")
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, input="y\n"
    )
    assert done.stdout == "loaded\n", done.stderr
    # So the code would have been noticed, had anything run it before.
    assert done.stderr.rstrip().endswith("RuntimeError: remote code was run")


class TestSettings:
    def test_all_that_the_configuration_says(self, folder):
        expected = {
            "memory_layers": [1, 3],
            "window": WINDOW,
            "positions": "first",
            "dtype": "float32",
            "last_context_length": 12,
        }
        assert memory_settings(folder) == memory_settings(CONFIG) == expected
        config = MemoryConfig(**memory_settings(folder))
        assert (config.top_k, config.retriever) == (MemoryConfig().top_k, "exact")

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            # The defaults of LongLLaMA's configuration.
            ({"mem_positionals": LEAVE_OUT}, {"positions": "first"}),
            ({"mem_dtype": LEAVE_OUT}, {"dtype": "bfloat16"}),
            ({"max_position_embeddings": LEAVE_OUT}, {"window": 2048, "last_context_length": 12}),
            ({"max_position_embeddings": 2048, "last_context_length": LEAVE_OUT}, {"last_context_length": 1024}),
            ({"last_context_length": LEAVE_OUT}, {"last_context_length": WINDOW}),
            ({"num_hidden_layers": LEAVE_OUT, "mem_layers": [31]}, {"memory_layers": [31]}),
            # Other values.
            ({"mem_positionals": False}, {"positions": "none"}),
            ({"mem_dtype": "float16"}, {"dtype": "float32"}),
            ({"mem_layers": [3, 1, 3]}, {"memory_layers": [1, 3]}),
            ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, {"memory_layers": [1, 3]}),
        ],
    )
    def test_defaults_and_other_values(self, changes, expected):
        found = memory_settings(changed(**changes))
        assert found.items() >= expected.items()
        MemoryConfig(**found)

    @pytest.mark.parametrize(
        ("key", "value", "replaced_by"),
        [
            ("mem_layers", [], {"memory_layers": [2]}),
            ("mem_layers", LEAVE_OUT, {"memory_layers": [2]}),
            ("mem_layers", [1, 4], {"memory_layers": [2]}),
            ("mem_layers", [-1], {"memory_layers": [2]}),
            ("mem_layers", "6, 12, 18", {"memory_layers": [2]}),
            ("mem_layers", [True], {"memory_layers": [2]}),
            ("mem_dtype", "float8", {"dtype": None}),
            ("mem_dtype", None, {"dtype": "bfloat16"}),
            ("mem_positionals", "yes", {"positions": "none"}),
            ("max_position_embeddings", 0, {"window": 32}),
            ("last_context_length", -1, {"last_context_length": 4}),
            ("last_context_length", WINDOW + 1, {"last_context_length": 4}),
        ],
    )
    def test_a_setting_that_cannot_be_is_named_unless_it_is_replaced(self, key, value, replaced_by):
        config = changed(**{key: value})
        with pytest.raises(SettingError) as caught:
            memory_settings(config)
        assert caught.value.setting == key
        MemoryConfig(**memory_settings(config, **replaced_by))

    def test_the_callers_settings_win(self):
        found = memory_settings(CONFIG, memory_layers=[0], window=8, top_k=5)
        # Twelve of sixteen tokens: of eight, at most all.
        assert found == {
            "memory_layers": [0],
            "window": 8,
            "top_k": 5,
            "positions": "first",
            "dtype": "float32",
            "last_context_length": 8,
        }

    def test_other_models_say_nothing(self):
        assert memory_settings({"model_type": "llama", "num_hidden_layers": 4}, window=9) == {"window": 9}
        # The same word for another kind of memory.
        assert memory_settings({"model_type": "qwen3_mem_embed", "mem_layers": [1], "mem_size": 64}) == {}
        with pytest.raises(SettingError, match="the folder has no config"):
            memory_settings(REPOSITORY / "docs")


@pytest.mark.parametrize(("positionals", "positions"), [(True, "first"), (False, "none")])
def test_logits_are_those_of_dense_attention_over_the_whole_memory(tmp_path, positionals, positions):
    model, ids = llama(), tokens(1, 3 * WINDOW + 5)
    folder = write_folder(tmp_path / "long", model, mem_positionals=positionals)
    with attach_pretrained(str(folder), top_k=4096) as lm, torch.no_grad():
        logits = lm(ids).logits[0]
    expected = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3], positions)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    other = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3], "none" if positions == "first" else "first")
    assert float((other - expected).abs().max()) > 0.1


def test_memory_is_stored_as_the_configuration_says(tmp_path):
    model, ids = llama(), tokens(1, 3 * WINDOW)
    folder = write_folder(tmp_path / "long", model, mem_dtype="bfloat16")
    with attach_pretrained(str(folder), top_k=4096) as lm, torch.no_grad():
        out = lm(ids)
    assert out.memory.layers[1].keys.dtype == torch.bfloat16
    assert out.memory.layers.keys() == {1, 3}
    expected = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3])
    difference = (out.logits[0].double() - expected).abs().max() / expected.std()
    assert 1e-4 < float(difference) < 0.2


def test_a_memory_of_its_own_equals_settings_by_hand(folder):
    ids = tokens(1, 40)
    with torch.no_grad():
        with attach_pretrained(str(folder), top_k=4) as lm:
            found = lm(ids).logits
        config = MemoryConfig(
            memory_layers=[1, 3], window=WINDOW, top_k=4, dtype="float32", last_context_length=12, retriever="exact"
        )
        with attach_memory(llama(), config) as lm:
            assert torch.equal(lm(ids).logits, found)


class TestDamage:
    def test_missing_weights_are_refused(self, tmp_path):
        folder = write_folder(tmp_path / "long", llama(), safetensors=True)
        weights = dict(llama().state_dict())
        del weights["lm_head.weight"], weights["model.layers.2.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SettingError, match=r"2 of its weights are missing \(lm_head.weight, model.layers.2"):
            load_backbone(str(folder))

    @pytest.mark.parametrize("safetensors", [False, True])
    def test_a_file_cut_short_is_refused(self, tmp_path, safetensors):
        folder = write_folder(tmp_path / "long", llama(), safetensors)
        file = sorted(folder.glob("*.safetensors" if safetensors else "pytorch_model*.bin"))[0]
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(SettingError, match="cannot be loaded"):
            load_backbone(str(folder))

    def test_weights_of_another_size_are_refused(self, tmp_path):
        folder = write_folder(tmp_path / "long", llama(), intermediate_size=80)
        with pytest.raises(SettingError, match="cannot be loaded"):
            load_backbone(str(folder))

    def test_a_configuration_that_is_no_json_is_refused(self, tmp_path):
        folder = write_folder(tmp_path / "long", llama())
        (folder / "config.json").write_text('{"model_type": "longl')
        with pytest.raises(SettingError, match=r"config.json cannot be read"):
            attach_pretrained(str(folder))


def test_a_sentencepiece_model_needs_its_library_and_weights_alone_do_not(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "long", llama())
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(SettingError, match="no tokenizer"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.model").write_bytes(b"\n")
    for library in ("sentencepiece", "tiktoken"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match="pip install sentencepiece"):
        check_backbone(str(folder))
    load_backbone(str(folder))


class TestCommandLine:
    def request(self, folder, *words):
        return read_request("run", ["--config", "smoke", f"--model.backbone={folder}", *words])

    def test_what_is_not_set_comes_from_the_checkpoint(self, tmp_path, folder):
        (tmp_path / "own.yaml").write_text(f"model:\n  backbone: {folder}\n  memory:\n    top_k: 7\n")
        request = read_request("run", ["--config", str(tmp_path / "own.yaml"), "--model.memory.positions=none"])
        check_settings(request)
        arguments = ["--config", str(tmp_path / "own.yaml"), *request.overrides]
        config = parse(request, arguments).model.memory_config
        assert (config.memory_layers, config.window, config.top_k) == ([1, 3], WINDOW, 7)
        assert (config.positions, config.dtype, config.last_context_length) == ("none", "float32", 12)
        own = f"Memory settings of {folder}: memory_layers=[1, 3], window=16, dtype=float32"
        assert f"{own}, last_context_length=12." in request.notes
        assert f"{folder} was made for positions=first; this run has positions=none." in request.notes
        assert any("top_k=7" in note for note in request.notes)

    def test_explicit_settings_win_and_the_difference_is_said(self, folder):
        request = self.request(folder, "--model.memory.memory_layers=[2]")
        check_settings(request)
        memory = request.get("model.memory")
        # The shipped file sets the window; a context within it is kept within it.
        assert (memory["memory_layers"], memory["window"], memory["last_context_length"]) == ([2], 64, 12)
        said = f"{folder} was made for memory_layers=[1, 3], window=16; this run has memory_layers=[2], window=64."
        assert said in request.notes
        assert not any(word.startswith("--model.memory.window") for word in request.overrides)

    def test_settings_that_agree_are_not_mentioned(self, folder):
        request = self.request(folder, "--model.memory.window=16")
        check_settings(request)
        assert not any("was made for" in note for note in request.notes)

    def test_other_backbones_are_left_alone(self):
        request = read_request("run", ["--config", "smoke"])
        before = list(request.overrides)
        check_settings(request)
        assert request.overrides == before

    def test_a_checkpoint_without_memory_needs_layers(self, tmp_path, capsys):
        folder = write_folder(tmp_path / "long", llama(), mem_layers=[])
        config = tmp_path / "own.yaml"
        config.write_text(f"model:\n  backbone: {folder}\n")
        assert main(["run", "--config", str(config)]) == 2
        assert "mem_layers=[]: names no layer" in capsys.readouterr().err
        check_settings(read_request("run", ["--config", str(config), "--model.memory.memory_layers=[1]"]))


@pytest.mark.parametrize(
    "spec", ["evil.Index", {"name": "evil.Index", "M": 3}, {"layers": {"1": "exact", "3": "evil.Index"}}]
)
def test_a_model_from_elsewhere_names_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: object) -> None:
    """To import the class is to run its module: whoever made the folder could have any code run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Index: pass\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    memory = {"memory_layers": [1, 3], "window": WINDOW, "retriever": spec}
    with attach_memory(load_backbone("tiny-random-llama"), MemoryConfig(**{**memory, "retriever": "exact"})) as lm:
        lm.save_pretrained(tmp_path / "model", load_tokenizer("tiny-random-llama"))
    file = tmp_path / "model" / "lightning_fot.json"
    file.write_text(json.dumps({"format": 1, "memory": memory}), encoding="utf-8")
    with pytest.raises(SettingError, match=r"evil\.Index.*If you trust it, name it yourself"):
        attach_pretrained(str(tmp_path / "model"))
    (tmp_path / "mine.yaml").write_text(f"model: {{backbone: {tmp_path / 'model'}}}", encoding="utf-8")
    with pytest.raises(SettingError, match=r"evil\.Index"):
        check_settings(read_request("run", ["--config", "mine.yaml"]))
    check_settings(read_request("run", ["--config", "mine.yaml", "--model.memory.retriever=exact"]))
    with attach_pretrained(str(tmp_path / "model"), retriever="exact") as lm:
        assert lm.config.retriever == "exact"
    assert not (tmp_path / "ran").exists()
