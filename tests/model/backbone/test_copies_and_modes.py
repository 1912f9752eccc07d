"""An attached model in train mode, compiled, copied, offloaded, with virtual tokens: it works, or says what to do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone
from tests.support.models import settings, tiny_llama, tokens

IDS, QUESTION = tokens(1, 60), tokens(1, 9, seed=1)
# Names that peft uses, and that older versions of transformers know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("changes", [{}, {"overlap": 4, "sink_tokens": 1}])
def test_checkpointing_does_not_take_the_cache_away(changes: dict[str, Any]) -> None:
    model = tiny_llama()
    with attach_memory(model, settings(**changes)) as lm:
        memory = lm.ingest(IDS, lm.new_memory())
        want = lm.generate(QUESTION, memory=memory, max_new_tokens=30, do_sample=False)
        with torch.no_grad():
            logits = lm(IDS, memory=memory).logits
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            assert torch.equal(lm.generate(QUESTION, memory=memory, max_new_tokens=30, do_sample=False), want)
        again = lm.ingest(IDS, lm.new_memory())
        assert torch.equal(again.layers[3].keys, memory.layers[3].keys)
        with torch.no_grad():
            assert torch.equal(lm(IDS, memory=memory).logits, logits)
        with pytest.raises(SettingError, match="gradient_checkpointing"):
            lm(IDS, memory=memory)
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
        # A forward that fails leaves it on as well.
        with pytest.raises(SettingError, match="streamer failed"):
            lm.generate(QUESTION, memory=memory, max_new_tokens=9, stopping_criteria=[_fails])
        assert all(layer.gradient_checkpointing for layer in model.model.layers)


def _fails(ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
    raise SettingError("stopping_criteria", 1, "streamer failed", "Correct it.")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    with pytest.raises(SettingError, match="virtual tokens"):
        attach_memory(model, settings())
    # Weights alone are served.
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with attach_memory(peft.get_peft_model(tiny_llama(), lora).eval(), settings()) as lm:
        lm(QUESTION)


def test_offloaded_weights_are_named() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(SettingError, match="offloaded"):
        attach_memory(model, settings())


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, pickle.dumps, lambda what: torch.save(what, io.BytesIO())]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "save"])
def test_an_attached_model_is_not_copied_by_halves(copied: Callable[[Any], Any]) -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        want = lm(IDS).logits
        for what in (lm, model):
            with pytest.raises(SettingError, match="Detach the memory"):
                copied(what)
        assert torch.equal(lm(IDS).logits, want)
    copied(model)
    with attach_memory(copy.deepcopy(model), settings()) as lm:
        assert torch.equal(lm(IDS).logits, want)


def test_memories_are_copied_as_values() -> None:
    with attach_memory(tiny_llama(), settings()) as lm:
        memory = lm.ingest(IDS, lm.new_memory(), document="one")
        want = lm.generate(QUESTION, memory=memory, max_new_tokens=9, do_sample=False)
        for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
            assert torch.equal(lm.generate(QUESTION, memory=other, max_new_tokens=9, do_sample=False), want)
            lm.ingest(QUESTION, other)
            assert (len(memory), len(other)) == (60, 69)
            assert [known.name for known in other.documents][:1] == ["one"]
        other = pickle.loads(pickle.dumps(memory))
        with torch.no_grad():
            lm.model.model.layers[0].mlp.up_proj.weight.add_(1.0)
        with pytest.raises(SettingError, match="weights"):
            lm(QUESTION, memory=other)


COMPILED: list[Callable[[Any], Any]] = [
    lambda model: model.compile(backend="eager"),
    lambda model: model.model.layers[0].compile(backend="eager"),
    lambda model: model.model.layers[2].self_attn.compile(backend="eager"),
]


@pytest.mark.parametrize("compiles", COMPILED, ids=["model", "layer", "attention"])
def test_compiling_is_refused_before_attaching_and_after(compiles: Callable[[Any], Any]) -> None:
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        compiles(model)
        with pytest.raises(SettingError, match="compile"):
            lm(QUESTION)
        with pytest.raises(SettingError, match="compile"):
            lm.generate(QUESTION, max_new_tokens=2)
    with pytest.raises(SettingError, match="compile"):
        attach_memory(model, settings())


@pytest.mark.slow
def test_a_wrapper_that_compiles_is_refused_and_parts_without_attention_may_be_compiled() -> None:
    with pytest.raises(SettingError, match=r"LlamaForCausalLM.*is compiled"):
        attach_memory(torch.compile(tiny_llama(), backend="eager"), settings())
    model = tiny_llama()
    with attach_memory(model, settings()) as lm, torch.no_grad():
        want = lm(IDS).logits
        for layer in model.model.layers:
            layer.mlp.compile(backend="eager")
        assert torch.equal(lm(IDS).logits, want)


MODES: list[dict[str, Any]] = [
    {}, {"dtype": "int8"}, {"capacity": 40}, {"overlap": 4},
    {"retriever": {"name": "hnsw", "min_index_size": 32, "build": "blocking", "num_threads": 1}, "top_k": 4},
]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [pytest.param(each, marks=[pytest.mark.slow] * bool(each)) for each in MODES],
    ids=["plain", "int8", "capacity", "overlap", "hnsw"],
)
def test_what_is_made_in_inference_mode_is_used_outside(changes: dict[str, Any], tmp_path: Any) -> None:
    model = tiny_llama()
    with torch.inference_mode():
        lm = attach_memory(model, settings(**changes))
    memory = _filled(lm)
    with torch.inference_mode():
        again = _filled(lm)
        lm.generate(QUESTION, memory=again, max_new_tokens=20, do_sample=False)
    torch.testing.assert_close(again.layers[3].keys, memory.layers[3].keys)
    for each in (memory, again):
        lm.ingest(IDS, each)
        lm(IDS, memory=each, labels=IDS).loss.backward()
        lm(IDS, memory=each, update_memory=True)
        lm.generate(QUESTION, memory=each, max_new_tokens=20, update_memory=True, do_sample=False)
        each.save(tmp_path / str(id(each)))
        with torch.inference_mode():
            lm.ingest(IDS, each)
            each.flush()
        lm.ingest(IDS, each.snapshot())
    lm.detach()


def _filled(lm: MemoryLM) -> Any:
    memory = lm.ingest(IDS, lm.new_memory())
    memory.flush()
    return memory


def test_gates_made_in_inference_mode_are_trained() -> None:
    with torch.inference_mode():
        lm = attach_memory(load_backbone("tiny-random-llama"), settings(attending="gate"))
    lm(IDS, labels=IDS).loss.backward()
    assert lm.gates["1"].grad is not None
    lm.detach()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["exact", "hnsw", "faiss_ivf"])
def test_the_default_dtype_is_the_callers_affair(dtype: torch.dtype, name: str) -> None:
    spec = {"name": name, "build": "blocking", "num_threads": 1}
    if name != "exact":
        spec["min_index_size"] = 32
    found = []
    model = tiny_llama()
    try:
        for default in (torch.float32, dtype):
            torch.set_default_dtype(default)
            with attach_memory(model, settings(dtype="int8", top_k=8, retriever=spec)) as lm, torch.no_grad():
                memory = lm.ingest(tokens(1, 150), lm.new_memory())
                memory.flush()
                with lm.record_attention() as trace:
                    found.append(lm(QUESTION, memory=memory).logits)
                trace.passages(memory)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=1e-2)
