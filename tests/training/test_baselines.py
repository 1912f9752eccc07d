"""Comparison modes: what makes each of them itself, against oracles that share no code with the package."""

from __future__ import annotations

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.commands.job.parsing import parse
from lightning_fot.model.attention.crossbatch import paper_rows
from lightning_fot.request.request import SHIPPED, read_request
from tests.support.models import WINDOW, settings, tiny_llama, tokens


def _memorizing_model():
    """In fp64, gates that differ by head and layer: at sigmoid(0) heads could be mixed up unseen."""
    lm = attach_memory(tiny_llama().double(), settings(attending="gate"))
    with torch.no_grad():
        for number, gate in enumerate(lm.gates.values()):
            gate.data = torch.linspace(-1, 1, len(gate), dtype=torch.float64) + number
    return lm


def test_memorizing_is_a_gate_and_detached_pairs_without_negatives():
    path = str(SHIPPED / "baselines" / "memorizing.yaml")
    module = parse(read_request("run", ["--config", path]), ["--config", path]).model
    assert module.memory_config.attending == {"name": "gate"}
    assert module.crossbatch_config.differentiable is False
    assert (module.crossbatch_config.layout, module.crossbatch_config.d) == ("paper", 1)


def test_memorizing_stored_pairs_get_no_gradient():
    """The windows before, embedded in a call of their own, get none; with ``differentiable`` they get some."""
    ids, previous = tokens(3, WINDOW), tokens(3, WINDOW, seed=1)[:, None]
    lm, kept = _memorizing_model(), []
    layer = lm.model.model.layers[1].self_attn
    hooks = [part.register_forward_hook(lambda *call: kept.append(call[2])) for part in (layer.k_proj, layer.v_proj)]
    for differentiable in (False, True):
        kept.clear()
        logits = lm.crossbatch(ids, paper_rows(3, 1), previous, differentiable=differentiable)
        stored, own = kept[:2], kept[2:4]
        gradients = torch.autograd.grad(logits.square().mean(), [*stored, *own], allow_unused=True)
        assert all(grad is not None and bool(grad.any()) for grad in gradients[2:])
        assert all((grad is not None and bool(grad.any())) == differentiable for grad in gradients[:2])
    for hook in hooks:
        hook.remove()


def test_memorizing_gates_have_the_gradient_of_finite_differences():
    ids, previous = tokens(3, WINDOW), tokens(3, WINDOW, seed=1)[:, None]
    lm = _memorizing_model()

    def loss():
        return lm.crossbatch(ids, paper_rows(3, 1), previous, differentiable=False).square().mean()

    gates = list(lm.gates.values())
    gradients = torch.autograd.grad(loss(), gates)
    step = 1e-2  # transformers' norms are in fp32 whatever the model's dtype: smaller steps drown in their rounding
    with torch.no_grad():
        for gate, gradient in zip(gates, gradients, strict=True):
            for head in range(len(gate)):
                there = gate[head].clone()
                gate[head] = there + step
                above = float(loss())
                gate[head] = there - step
                below = float(loss())
                gate[head] = there
                assert float(gradient[head]) == pytest.approx((above - below) / (2 * step), rel=1e-2, abs=5e-5)


def test_memorizing_trains_on_what_it_reads():
    """A row beside its previous window has the logits of that text, read window by window; one memory layer."""
    ids = tokens(2, 2 * WINDOW)
    lm = attach_memory(tiny_llama(), settings(memory_layers=[1], attending="gate"))
    with torch.no_grad():
        lm.gates["1"].copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        read = lm(ids).logits[:, WINDOW:]
        trained = lm.crossbatch(ids[:, WINDOW:], paper_rows(2, 1), ids[:, None, :WINDOW], differentiable=False)
    torch.testing.assert_close(trained, read, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["long_finetune", "extrapolation", "rectified"])
def test_baselines_without_a_memory_read_the_full_context(name: str) -> None:
    path = str(SHIPPED / "baselines" / f"{name}.yaml")
    job = parse(read_request("run", ["--config", path]), ["--config", path])
    assert job.model.memory_config.memory_layers == []
    assert job.evaluation.readings == ["full_context"]
    # Rows see nothing of each other, and the whole backbone is trained where there are steps.
    assert (job.model.crossbatch_config.pack, job.model.crossbatch_config.range) == (1, 0)
    assert job.model.trainable == "all"
    assert (job.model.rope is not None) == (name == "extrapolation")
    assert (job.model.memory_config.attending is not None) == (name == "rectified")
