"""Reading input of any length: against an independent fp64 oracle, the plain backbone, and itself in pieces."""

import weakref
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_fot import attach_memory
from lightning_fot.model.backbone.layers import decoder_of
from tests.support.models import WINDOW, settings, tiny_llama, tokens
from tests.support.oracle import dense_logits


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_without_memory_layers_long_input_equals_each_window_alone():
    model, ids = tiny_llama(), tokens(1, 40)
    expected = torch.cat([model(part).logits for part in ids.split(WINDOW, dim=1)], dim=1)
    with attach_memory(model, settings(memory_layers=[])) as lm:
        torch.testing.assert_close(lm(ids).logits, expected)


def test_error_falls_as_more_neighbours_are_read():
    model, ids = tiny_llama(), tokens(1, 96)
    full = dense_logits(model, ids[0].tolist(), WINDOW, [1, 3])
    errors = []
    for top_k in (1, 8, 32, 80):
        with attach_memory(model, settings(top_k=top_k)) as lm:
            errors.append(float((lm(ids).logits[0] - full).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_a_window_retrieves_nothing_of_itself_and_memory_grows_window_by_window():
    ids = tokens(1, 42)
    with attach_memory(tiny_llama(), settings()) as lm:
        lengths = []
        memory = lm.new_memory()
        for part in ids.split(WINDOW, dim=1):
            lm.ingest(part, memory)
            lengths.append(len(memory))
    assert lengths == [16, 32, 42]


def test_ingest_then_read_equals_one_call():
    ids = tokens(2, 70)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        whole = lm(ids)
        memory = lm.new_memory(2)
        seen = []
        lm.ingest(ids[:, :48], memory, progress=seen.append)
        rest = lm(ids[:, 48:], memory=memory)
    torch.testing.assert_close(rest.logits, whole.logits[:, 48:], atol=1e-5, rtol=1e-5)
    assert seen == [32, 32, 32]
    assert len(memory) == 48
    assert len(rest.memory) == 70


@pytest.mark.parametrize("change", [{}, {"overlap": 3}, {"overlap": 3, "sink_tokens": 2, "skip_window_start": 1}])
@pytest.mark.parametrize("kind", [None, "left"])
def test_reading_computes_nothing_above_the_last_memory_layer(change, kind):
    """And the memory is that of a call that also gives logits, for which all layers are computed."""
    ids, mask = ragged(kind)
    with attach_memory(tiny_llama(), settings(memory_layers=[1], top_k=3, **change)) as lm:
        ran = Counter()
        for index, layer in enumerate(decoder_of(lm.model).layers):
            layer.mlp.register_forward_hook(lambda *_, index=index: ran.update([index]))
        whole = lm.new_memory(len(ids))
        lm(ids, memory=whole, attention_mask=mask, update_memory=True)
        assert ran[3] == ran[0]
        ran.clear()
        read = lm.ingest(ids, lm.new_memory(len(ids)), attention_mask=mask)
        assert ran[0]
        assert sum(ran[index] for index in (1, 2, 3)) == 0
        # A text that goes on is read further.
        for memory in (whole, read):
            lm.ingest(ids, memory, attention_mask=mask)
        for row in range(len(ids)):
            stored = whole.layers[1].lengths[row]
            assert stored == read.layers[1].lengths[row] > 0
            for name in ("keys", "values"):
                wanted, found = (getattr(memory.layers[1], name)[row, :, :stored] for memory in (whole, read))
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_memory_given_stays_as_it_was_and_questions_do_not_see_each_other():
    text, first, second = tokens(1, 48), tokens(1, 20, seed=1), tokens(1, 24, seed=2)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        memory = lm.ingest(text, lm.new_memory())
        alone = lm(second, memory=memory).logits
        lm(first, memory=memory)
        lm.generate(first, memory=memory, max_new_tokens=20)
        again = lm(second, memory=memory).logits
        assert len(memory) == 48
        lm(first, memory=memory, update_memory=True)
        assert len(memory) == 68
    assert torch.equal(alone, again)


def test_skip_window_start_leaves_the_first_keys_out():
    ids = tokens(1, 40)
    with attach_memory(tiny_llama(), settings(skip_window_start=2)) as lm:
        assert len(lm(ids).memory) == 40 - 3 * 2


def test_capacity_keeps_the_newest():
    ids = tokens(1, 160)
    with attach_memory(tiny_llama(), settings(memory_layers=[1], capacity=64)) as lm:
        bounded = lm(ids).memory
        assert len(bounded) <= 64
    with attach_memory(tiny_llama(), settings(memory_layers=[1])) as lm:
        full = lm(ids).memory
    kept = len(bounded)
    # Layer 1 is the first memory layer: its keys do not depend on what is retrieved.
    torch.testing.assert_close(bounded.layers[1].keys, full.layers[1].keys[:, :, -kept:])


def ragged(kind):
    """Four rows of 41 columns: padding on the left, on the right, or anywhere."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 41, dtype=torch.int64)
    for row, length in enumerate([41, 17, 2, 33]):
        if kind == "holes":
            mask[row, torch.randperm(41, generator=generator)[:length]] = 1
        else:
            mask[row, slice(41 - length, 41) if kind == "left" else slice(0, length)] = 1
    return tokens(4, 41), mask


@pytest.mark.parametrize(
    ("kind", "keep", "positions"),
    [("left", 0, "first"), ("left", 1, "none"), ("right", 1, "first"), ("holes", 30, "none")],
)
def test_the_loss_is_that_of_a_dense_pass_over_each_row(kind, keep, positions):
    """Whatever logits are kept: padding is no target, and the last token of a window predicts the next window."""
    ids, mask = ragged(kind)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)
    model = tiny_llama()
    losses = []
    for row in range(4):
        own, targets = ids[row][mask[row].bool()], labels[row][mask[row].bool()]
        logits = dense_logits(model, own.tolist(), WINDOW, [1, 3], positions)
        losses.append(F.cross_entropy(logits[:-1], targets[1:], reduction="none")[targets[1:] != -100])
    with attach_memory(model, settings(positions=positions)) as lm:
        out = lm(ids, attention_mask=mask, labels=labels, logits_to_keep=keep)
    assert float(out.loss) == pytest.approx(float(torch.cat(losses).mean()), abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "left", "right", "holes"])
@pytest.mark.parametrize("overlap", [0, 4])
def test_kept_logits_are_the_last_columns_of_all(kind, overlap):
    ids, mask = ragged(kind)
    mask = None if kind is None else mask
    with attach_memory(tiny_llama(), settings(top_k=8, overlap=overlap)) as lm:
        full = lm(ids, attention_mask=mask, labels=ids)
        for keep in (1, 16, 17, 41, 99):
            few = lm(ids, attention_mask=mask, logits_to_keep=keep)
            assert few.loss is None
            assert few.logits.shape[1] == min(keep, 41)
            # Fewer rows in a matrix product may round elsewhere.
            torch.testing.assert_close(few.logits, full.logits[:, -keep:], atol=2e-5, rtol=0)
        both = lm(ids, attention_mask=mask, labels=ids, logits_to_keep=17)
    assert torch.equal(both.loss, full.loss)
    assert torch.equal(both.logits, full.logits[:, -17:])
    if mask is not None:
        assert float(full.logits[mask == 0].abs().max()) == 0


@torch.enable_grad()
def test_the_gradient_of_the_loss_is_that_of_all_logits():
    ids = tokens(2, 41)
    gradients = []
    for joined in (False, True):
        model = tiny_llama()
        with attach_memory(model, settings(top_k=8)) as lm:
            if joined:
                logits = lm(ids).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            else:
                loss = lm(ids, labels=ids, logits_to_keep=1).loss
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_without_a_target_the_loss_is_not_a_number_as_in_transformers():
    ids = tokens(1, 20)
    with attach_memory(tiny_llama(), settings()) as lm:
        assert lm(ids, labels=torch.full_like(ids, -100)).loss.isnan()


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that operations have made and somebody still holds; ``peak`` is the most there were."""

    def __init__(self):
        super().__init__()
        self.held, self.sizes, self.now, self.peak = Counter(), {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for part in tree_leaves(output):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                self.held[storage._cdata] += 1
                if self.held[storage._cdata] == 1:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                weakref.finalize(part, self._release, storage._cdata)
        self.peak = max(self.peak, self.now)
        return output

    def _release(self, key):
        self.held[key] -= 1
        if not self.held[key]:
            self.now -= self.sizes.pop(key)


def read_all(lm, ids, mask):
    return lm(ids).logits


def read_last(lm, ids, mask):
    return lm(ids, logits_to_keep=1).logits


def read_loss(lm, ids, mask):
    return lm(ids, labels=ids, logits_to_keep=1).loss


def read_padded_loss(lm, ids, mask):
    return lm(ids, attention_mask=mask, labels=ids, logits_to_keep=3).loss


def ingest(lm, ids, mask):
    lm.ingest(ids, lm.new_memory(2), attention_mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "overlap"),
    [(read_last, 0), (read_loss, 0), (read_loss, 4), (read_padded_loss, 0), (ingest, 0), (read_all, 0)],
)
def test_long_input_takes_the_room_of_its_memory_and_of_one_window(read, overlap):
    """Four times the text: a fraction of a token's 8 kB of logits a token more, for memory and ids."""
    model = tiny_llama()
    model.resize_token_embeddings(2000, mean_resizing=False)
    peaks = {}
    with attach_memory(model, settings(top_k=8, overlap=overlap)) as lm:
        for length in (64, 256):
            mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
            with LiveBytes() as live:
                read(lm, tokens(2, length), mask)
            peaks[length] = live.peak
    growth = (peaks[256] - peaks[64]) / (2 * (256 - 64))
    if read is read_all:
        assert growth > 8000
    else:
        assert growth < 2500
