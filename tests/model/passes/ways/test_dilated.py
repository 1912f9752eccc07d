"""Dilated attention on the memory layers: the paper's formulas, written out, for the function and for whole models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM

from lightning_fot import (
    CrossbatchConfig,
    EvaluationConfig,
    FocusedTransformer,
    MemoryConfig,
    attach_memory,
    attach_pretrained,
)
from lightning_fot.commands.job.parsing import parse
from lightning_fot.config import RopeSettings
from lightning_fot.config.schedule import ScheduleConfig
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.measures.scoring import plain_tokens, score_continuations
from lightning_fot.evaluation.measures.whole_text import read_whole
from lightning_fot.model.attention.dilated import dilated_attention, first_needed
from lightning_fot.model.backbone.stretch import stretch_positions
from lightning_fot.model.passes.ways.dilated import dilated_logits
from lightning_fot.model.reading import batched
from lightning_fot.pretrained import load_tokenizer
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import SHIPPED, read_request
from tests.support.models import WINDOW, settings, tiny_llama, tiny_qwen3, tokens
from tests.support.pair_oracle import causal, pair_logits, plain_frequencies, rotary_score
from tests.support.quiet_trainer import trainer

LENGTH = 3 * WINDOW
# Segments that are no multiples of each other or of their dilation; more offsets than heads.
PATTERNS = [(8, 1), (16, 3), (20, 2), (32, 5)]
_PLAIN = {"name": "dilated", "segments": [WINDOW], "dilations": [1]}
SEGMENTS, DILATIONS = ([pair[side] for pair in PATTERNS] for side in (0, 1))


def _paper(query: Tensor, key: Tensor, value: Tensor, head: int, scale: float) -> Tensor:
    """One head (T, D) by sections 3.1 to 3.3: sparsified segments, outputs scattered, mixed by softmax denominators."""
    length = len(query)
    outputs, denominators = [], []
    for size, step in PATTERNS:
        output, denominator = [torch.zeros_like(value[0])] * length, [value.new_zeros(())] * length
        for begin in range(0, length, size):
            rows = [place for place in range(begin, min(begin + size, length)) if (place - begin) % step == head % step]
            for number, row in enumerate(rows):
                exponents = (query[row] @ key[rows[: number + 1]].T * scale).exp()
                denominator[row] = exponents.sum()
                output[row] = exponents @ value[rows[: number + 1]] / denominator[row]
        outputs.append(torch.stack(output))
        denominators.append(torch.stack(denominator))
    total = sum(denominators)
    return sum((s / total)[:, None] * output for s, output in zip(denominators, outputs, strict=True))


def _inputs(length: int, kv_heads: int = 2, texts: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((texts, 4, length, 6), (texts, kv_heads, length, 6), (texts, kv_heads, length, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 16, 75])
def test_attention_and_gradients_are_those_of_the_papers_formulas(length: int, kv_heads: int) -> None:
    inputs = query, key, value = _inputs(length, kv_heads)
    found = dilated_attention(query, key, value, PATTERNS, scale=0.6)
    groups = torch.arange(4) // (4 // kv_heads)
    expected = torch.stack(
        [
            _paper(query[text, head], key[text, groups[head]], value[text, groups[head]], head, 0.6)
            for text in range(2)
            for head in range(4)
        ]
    ).reshape(query.shape)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad((output * weights).sum(), inputs) for output in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 7, 16])
def test_the_last_tokens_need_the_segments_in_progress_alone(new: int) -> None:
    query, key, value = _inputs(75)
    whole = dilated_attention(query, key, value, PATTERNS, scale=0.6)
    for stop in range(new, 76):
        first = first_needed(stop - new, PATTERNS)
        part = (query[:, :, stop - new : stop], key[:, :, first:stop], value[:, :, first:stop])
        found = dilated_attention(*part, PATTERNS, scale=0.6, stop=stop)
        torch.testing.assert_close(found, whole[:, :, stop - new : stop], atol=1e-12, rtol=1e-12)


@pytest.mark.slow
def test_gradients_of_the_last_tokens_are_finite_differences() -> None:
    query, key, value = _inputs(7, texts=1)
    patterns = [(4, 1), (6, 2)]

    def late(*tensors: Tensor) -> Tensor:
        return dilated_attention(tensors[0][:, :, 2:], *tensors[1:], patterns, scale=0.6, stop=7)

    assert torch.autograd.gradcheck(late, (query, key, value))


def test_one_segment_without_a_gap_is_plain_attention() -> None:
    query, key, value = _inputs(30)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.6, enable_gqa=True)
    torch.testing.assert_close(dilated_attention(query, key, value, [(64, 1)], scale=0.6), plain)


def _dilated(**changes) -> MemoryConfig:
    return settings(**{"attending": {"name": "dilated", "segments": SEGMENTS, "dilations": DILATIONS}, **changes})


def _log_counts(length: int, heads: int = 4) -> Tensor:
    """(H, T, T): how often query i sees key j over the patterns."""
    places = torch.arange(length)
    counts = torch.zeros(heads, length, length, dtype=torch.float64)
    for size, step in PATTERNS:
        for head in range(heads):
            chosen = places % size % step == head % step
            same = places[:, None] // size == places // size
            counts[head] += same & chosen[:, None] & chosen & (places[:, None] >= places)
    return counts.log()


def _read(lm, ids: Tensor, keep: int) -> Tensor:
    return torch.cat(list(read_whole(lm, ids, keep, "dilated")))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_model_is_the_oracle_in_training_and_in_reading(kv_heads: int) -> None:
    model, ids = tiny_llama(kv_heads), tokens(2, LENGTH)
    windows = torch.arange(LENGTH) // WINDOW
    local = causal(LENGTH).masked_fill(windows[:, None] != windows, -torch.inf)
    counts = {0: local, 1: _log_counts(LENGTH), 2: local, 3: _log_counts(LENGTH)}
    with attach_memory(model, _dilated()) as lm, torch.no_grad():
        trained, called = dilated_logits(lm.attachment, ids, PATTERNS), lm(ids)
        assert len(called.memory) == 0
        for row in range(2):
            expected = pair_logits(model, ids[row].tolist(), rotary_score(plain_frequencies(model)), counts)
            for found in (trained[row], called.logits[row], _read(lm, ids[row], LENGTH)):
                assert float((found - expected).abs().max()) < 2e-4
        # A call may end within a window.
        assert float((lm(ids[1:, :41]).logits[0] - expected[:41]).abs().max()) < 2e-4


def test_the_last_window_of_a_reading_is_full() -> None:
    """So that an answer behind a prompt has local context; 41 = 9 + 16 + 16."""
    model, ids = tiny_llama(), tokens(1, 41)[0]
    windows = (torch.arange(41) + 7) // WINDOW
    local = causal(41).masked_fill(windows[:, None] != windows, -torch.inf)
    counts = {0: local, 1: _log_counts(41), 2: local, 3: _log_counts(41)}
    expected = pair_logits(model, ids.tolist(), rotary_score(plain_frequencies(model)), counts)
    with attach_memory(model, _dilated()) as lm:
        for keep in (41, 20, 5):
            assert float((_read(lm, ids, keep) - expected[-keep:]).abs().max()) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["first", "none"])
def test_training_is_reading_with_norms_and_without_positions(positions: str) -> None:
    model, ids = tiny_qwen3(), tokens(2, LENGTH)
    with attach_memory(model, _dilated(positions=positions)) as lm, torch.no_grad():
        torch.testing.assert_close(dilated_logits(lm.attachment, ids, PATTERNS), lm(ids).logits, atol=5e-5, rtol=5e-5)


def test_padding_changes_nothing() -> None:
    model, ids = tiny_llama(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    with attach_memory(model, _dilated()) as lm, torch.no_grad():
        alone = lm(ids[:1, 19:]).logits[0]
        torch.testing.assert_close(lm(ids, attention_mask=mask).logits[0, 19:], alone, atol=5e-5, rtol=5e-5)


def test_no_token_sees_a_later_one() -> None:
    model, ids = tiny_llama(), tokens(1, LENGTH)
    changed = ids.clone()
    changed[0, 20] += 1
    with attach_memory(model, _dilated()) as lm, torch.no_grad():
        before, after = (dilated_logits(lm.attachment, text, PATTERNS)[0] for text in (ids, changed))
    assert torch.equal(before[:20], after[:20])
    # Place 24 is in another window, and sees it through the memory layers.
    assert bool((before[32:] != after[32:]).any())


def test_a_window_in_one_segment_is_the_plain_backbone_and_detaching_leaves_it() -> None:
    model, ids = tiny_llama(), tokens(2, WINDOW)
    with torch.no_grad():
        expected = model(ids).logits
        with attach_memory(model, settings(attending=_PLAIN)) as lm:
            torch.testing.assert_close(lm(ids).logits, expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(model(ids).logits, expected)


def _module(**changes) -> FocusedTransformer:
    made = FocusedTransformer("tiny-random-llama", _dilated(), CrossbatchConfig(pack=2), **changes)
    made.configure_model()
    return made


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_loss_of_a_batch_is_that_of_reading_its_packs(tmp_path) -> None:
    module = _module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    ids = torch.randint(3, 259, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, *(DataLoader([batch], batch_size=None) for _ in range(2)))
    module.eval()
    logits = torch.stack([_read(module.lm, text, 32) for text in batch["input_ids"].reshape(2, 32)])
    expected = float(F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected, abs=1e-5)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected, abs=1e-5)


def test_gradient_checkpointing_and_bfloat16_autocast_train_the_same() -> None:
    found = []
    for checkpointing, autocast in ((False, False), (True, False), (True, True)):
        module = _module(gradient_checkpointing=checkpointing)
        module.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = dilated_logits(module.lm.attachment, tokens(2, LENGTH), PATTERNS)
        logits.float().square().mean().backward()
        weight = module.lm.model.model.layers[1].self_attn.k_proj.weight
        found.append(weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)
    assert float((found[2] - found[0]).norm() / found[0].norm()) < 0.1


def test_the_evaluation_reads_a_context_so() -> None:
    ids = np.random.default_rng(0).integers(3, 200, 120)
    config = EvaluationConfig([64], 40, documents=1, passkey_tokens=[384], passkey_samples=1, readings=["dilated"])
    module = _module()
    document = SimpleNamespace(name="a", ids=ids)
    result = evaluate(module.lm, load_tokenizer("tiny-random-llama"), [document], config)
    rows = {row["memory"]: row for row in result["perplexity"]}
    assert set(rows) == {"none", "dilated"}
    assert {row["memory"] for row in result["tasks"]} == {"none", "dilated"}
    text = torch.as_tensor(ids[:105]).long()
    expected = F.cross_entropy(_read(module.lm, text[:-1], 40), text[-40:])
    assert rows["dilated"]["nll"] == pytest.approx(float(expected), abs=1e-5)


def test_the_configuration_reads_as_it_trains() -> None:
    path = str(SHIPPED / "baselines" / "dilated.yaml")
    request = read_request("run", ["--config", path])
    check_settings(request)
    job = parse(request, ["--config", path])
    memory = job.model.memory_config
    patterns = {"name": "dilated", "segments": [256, 1024, 4096], "dilations": [1, 4, 16]}
    assert (memory.memory_layers, memory.attending) == ([18, 20], patterns)
    assert job.evaluation.readings == ["dilated"]
    assert job.model.trainable == "memory_layers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [8, 0]}, r"segments=\[8, 0\].*whole numbers"),
        ({"dilations": [1, True]}, r"dilations=\[1, True\].*whole numbers"),
        ({"dilations": [1]}, r"segments=\[8, 16\]: has not one each"),
        ({"segments": []}, r"segments=\[\]: has not one each"),
        ({"dilations": [1, 17]}, r"dilations=\[1, 17\].*without a token"),
        ({"dilations": [2, 4]}, r"dilations=\[2, 4\].*without any pattern"),
        ({"memory_layers": []}, r"segments=\[8, 16\].*there are none"),
        ({"overlap": 4}, "overlap=4.*dilated"),
        ({"sink_tokens": 2}, "sink_tokens=2.*dilated"),
        ({"integration": "gate"}, "integration='gate'.*dilated"),
    ],
)
def test_patterns_that_are_none_are_named(change, message: str) -> None:
    own = {"name": "dilated", "segments": [8, 16], "dilations": [1, 2]}
    own |= {key: change[key] for key in own if key in change}
    others = {key: value for key, value in change.items() if key not in own}
    with pytest.raises(SettingError, match=message):
        settings(attending=own, **others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "paper"}, "layout='paper'"),
        ({"layout": "previous_window"}, "layout='previous_window'"),
        ({"differentiable": False}, "differentiable=False"),
        ({"across_ranks": True}, "across_ranks=True"),
        ({"schedule": ScheduleConfig()}, "schedule="),
    ],
)
def test_training_that_cannot_be_is_named(change, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        FocusedTransformer("tiny-random-llama", _dilated(), CrossbatchConfig(**change))


def test_what_needs_a_memory_is_refused() -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(tiny_llama(), settings()) as lm:
        filled = lm(ids).memory
    with attach_memory(tiny_llama(), _dilated()) as lm:
        for use in (
            lambda: lm.ingest(ids, lm.new_memory()),
            lambda: lm.generate(ids, max_new_tokens=2),
            lambda: lm(ids, memory=filled),
            lambda: score_continuations(lm, [1, 2], [[3]]),
        ):
            with pytest.raises(SettingError, match="in place of a memory"):
                use()
        with pytest.raises(SettingError, match="no whole windows"):
            dilated_logits(lm.attachment, ids[:, 1:], PATTERNS)
    with (
        attach_memory(tiny_llama(), _dilated(memory_layers=[1])) as lm,
        pytest.raises(SettingError, match="in place of a memory"),
    ):
        batched.read(lm.attachment, ids[0], lm.new_memory())
    for readings, memory in ((["memory"], _dilated()), (["dilated"], settings()), (["dilated", "memory"], _dilated())):
        with pytest.raises(SettingError, match="readings="):
            EvaluationConfig(readings=readings).check_readings(memory)
    EvaluationConfig(readings=["dilated", "full_context"]).check_readings(_dilated())


def test_no_text_is_known_to_be_read_as_by_the_plain_backbone() -> None:
    """A pair that several patterns have counts several times, however short the text."""
    assert plain_tokens(_dilated()) == 0


def test_a_saved_model_opens_with_its_patterns(tmp_path) -> None:
    ids = tokens(1, LENGTH)
    with attach_memory(tiny_llama(), _dilated()) as lm, torch.no_grad():
        expected = lm(ids).logits
        lm.save_pretrained(tmp_path / "model")
    with attach_pretrained(str(tmp_path / "model")) as lm, torch.no_grad():
        assert torch.equal(lm(ids).logits, expected)


def test_backbones_that_cannot_are_named() -> None:
    following = tiny_llama()
    stretch_positions(following, RopeSettings("dynamic", 2))
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 5.0}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **kinds)).eval()
    for model, message in ((following, "frequencies change"), (capped, "soft-capped")):
        with pytest.raises(SettingError, match=message):
            attach_memory(model, MemoryConfig(memory_layers=[1], window=WINDOW, attending=_PLAIN))
