"""Generating beside a memory: against an fp64 oracle, against each row alone, and against reading the same text."""

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F
from transformers import StoppingCriteria

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.model.passes.local_window import MemoryCache
from tests.support.models import VOCABULARY, WINDOW, settings, tiny_llama, tokens
from tests.support.stride_oracle import Text, logits_of

TOLERANCE = 2e-4  # fp32 against fp64 on logits of spread about 3
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def left_padded(rows, holes=True, seed=0):
    """Ids and mask of rows with so many tokens each, padded on the left; some padding lies inside the rows."""
    width = max(rows) + (3 if holes else 0)
    ids, mask = tokens(len(rows), width, seed), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, count in enumerate(rows):
        mask[row, width - count :] = 1
        if holes and count > 5:
            mask[row, width - count // 2 - 3 : width - count // 2] = 0
            mask[row, width - count - 3 : width - count] = 1
    assert mask.sum(1).tolist() == list(rows)
    return ids, mask


def alone(lm, ids, mask, row, **options):
    """One row generated alone, and its memory."""
    memory = lm.new_memory(1)
    out = lm.generate(ids[row][mask[row].bool()][None], memory=memory, update_memory=True, **options)
    return out, memory


def assert_same_row(memory, row, other):
    """Row ``row`` of a memory holds what the one row of the other holds: pairs, and the text that was read."""
    count = int(other.lengths[0])
    assert int(memory.lengths[row]) == count
    for index, layer in memory.layers.items():
        for name in ("keys", "values"):
            expected = getattr(other.layers[index], name)[0, :, :count]
            torch.testing.assert_close(getattr(layer, name)[row, :, :count], expected, atol=1e-4, rtol=1e-4)
    assert text_of(memory, row) == text_of(other, 0)


def text_of(memory, row):
    (document,) = [known for known in memory.documents if known.row == row]
    return memory.log.tokens(document.number, 0, document.tokens).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlap", "sinks", "skip", "positions"),
    [
        (0, 0, 0, "first"),
        (0, 10, 0, "first"),
        (4, 2, 0, "first"),
        (11, 3, 0, "none"),
        (1, 0, 2, "first"),
        (4, 2, 3, "none"),
    ],
)
def test_logits_equal_the_oracle_over_many_strides(overlap, sinks, skip, positions):
    model = tiny_llama()
    config = settings(overlap=overlap, sink_tokens=sinks, skip_window_start=skip, positions=positions)
    with attach_memory(model, config) as lm:
        memory = lm.new_memory()
        out = lm.generate(tokens(1, 37), memory=memory, max_new_tokens=30, update_memory=True, **GREEDY)
    if not overlap:
        sinks = sinks or 4
        overlap = (WINDOW - sinks) // 2
    text = Text(WINDOW, overlap, sinks, skip).read(67)
    expected = logits_of(model, out.sequences[0], text.seen, [1, 3], positions)
    torch.testing.assert_close(torch.cat(out.logits).double(), expected[36:-1], atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(expected[36:-1].argmax(-1), out.sequences[0, 37:])
    assert len(memory) == len(text.end().memory)
    assert memory.tokens_seen.tolist() == [67]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"overlap": 5, "sink_tokens": 3},
        {"sink_tokens": 2, "skip_window_start": 3},
        {"last_context_length": 6},
        {"last_context_length": 7, "overlap": 3, "sink_tokens": 2},
        {"memory_layers": []},
    ],
)
def test_padded_prompts_of_any_length_equal_each_alone(changes):
    ids, mask = left_padded([61, 13, 1, 38])
    options = {"max_new_tokens": 20, **GREEDY}
    with attach_memory(tiny_llama(), settings(**{"top_k": 6, **changes})) as lm:
        memory = lm.new_memory(4)
        together = lm.generate(ids, memory=memory, attention_mask=mask, update_memory=True, **options)
        for row in range(4):
            single, own = alone(lm, ids, mask, row, **options)
            assert torch.equal(together.sequences[row, ids.shape[1] :], single.sequences[0, -20:])
            logits = torch.stack([step[row] for step in together.logits])
            torch.testing.assert_close(logits, torch.cat(single.logits), atol=1e-4, rtol=1e-4)
            assert_same_row(memory, row, own)


@pytest.mark.slow
def test_a_question_to_each_row_of_a_filled_memory_equals_each_alone():
    texts, (ids, mask) = tokens(3, 50, seed=3), left_padded([20, 7, 33])
    with attach_memory(tiny_llama(), settings(top_k=5, overlap=4)) as lm:
        memory = lm.ingest(texts, lm.new_memory(3))
        together = lm.generate(ids, memory=memory, attention_mask=mask, max_new_tokens=20, do_sample=False)
        assert memory.lengths.tolist() == [50, 50, 50]
        for row in range(3):
            own = lm.ingest(texts[row : row + 1], lm.new_memory())
            prompt = ids[row][mask[row].bool()][None]
            single = lm.generate(prompt, memory=own, max_new_tokens=20, do_sample=False)
            assert torch.equal(together[row, -20:], single[0, -20:])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"overlap": 4, "sink_tokens": 2, "skip_window_start": 1}])
def test_rows_that_end_early_store_what_they_would_alone(changes):
    ids, mask = left_padded([9, 30, 17])
    with attach_memory(tiny_llama(), settings(top_k=6, **changes)) as lm:
        free = lm.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
        # Two ids that end each row at another step, one of them after a stride or more.
        ends, steps = next(
            (ends, steps)
            for ends in combinations(range(VOCABULARY), 2)
            for steps in [[next((i for i, id in enumerate(row) if id in ends), 99) for row in free.tolist()]]
            if len(set(steps)) == 3 and 18 < max(steps) < 99
        )
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": list(ends), "pad_token_id": 0}
        memory = lm.new_memory(3)
        together = lm.generate(ids, memory=memory, attention_mask=mask, update_memory=True, **options)
        for row, last in enumerate(steps):
            single, own = alone(lm, ids, mask, row, **options)
            new = together[row, ids.shape[1] :]
            assert torch.equal(new[: last + 1], free[row, : last + 1])
            assert torch.equal(new[: last + 1], single[0, -last - 1 :])
            assert set(new[last + 1 :].tolist()) <= {0}
            assert_same_row(memory, row, own)
        assert memory.tokens_seen.tolist() == [int(mask[row].sum()) + last + 1 for row, last in enumerate(steps)]


def test_rows_ended_by_a_criterion_of_the_user_store_nothing_more():
    class Rows(StoppingCriteria):
        """Ends row 0 after 4 new tokens, row 1 after 21; called once a step."""

        def __call__(self, input_ids, scores, **kwargs):
            new = input_ids.shape[1] - 20
            return torch.tensor([new >= 4, new >= 21])

    ids = tokens(2, 20)
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        memory = lm.new_memory(2)
        out = lm.generate(
            ids, memory=memory, max_new_tokens=40, do_sample=False, stopping_criteria=[Rows()], update_memory=True
        )
        assert out.shape == (2, 41)
        # No end token is set: the row that its criterion has ended gets padding all the same.
        assert out[0, 24:].eq(0).all()
        assert memory.tokens_seen.tolist() == [24, 41]
        for row, length in enumerate((24, 41)):
            _, own = alone(lm, ids, torch.ones_like(ids), row, max_new_tokens=length - 20, do_sample=False)
            assert_same_row(memory, row, own)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"overlap": 4}, {"overlap": 4, "sink_tokens": 2}, {"skip_window_start": 2}])
@pytest.mark.parametrize("length", [17, 50])
def test_last_context_length_is_ingesting_what_comes_before(changes, length):
    ids, config = tokens(1, length), settings(top_k=12, last_context_length=6, **changes)
    with attach_memory(tiny_llama(), config) as lm:
        first, second = lm.new_memory(), lm.new_memory()
        out = lm.generate(ids, memory=first, max_new_tokens=25, update_memory=True, **GREEDY)
        lm.ingest(ids[:, :-6], second)
        rest = lm.generate(ids[:, -6:], memory=second, max_new_tokens=25, update_memory=True, **GREEDY)
        assert torch.equal(out.sequences[:, -25:], rest.sequences[:, -25:])
        torch.testing.assert_close(torch.cat(out.logits), torch.cat(rest.logits), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first.layers[3].keys, second.layers[3].keys, atol=1e-5, rtol=1e-5)


def test_last_context_length_leaves_the_window_free_and_equals_the_oracle():
    model = tiny_llama()
    with attach_memory(model, settings(last_context_length=6)) as lm:
        out = lm.generate(tokens(1, 38), max_new_tokens=20, **GREEDY)
    # 32 tokens in two windows; then 6 of the prompt and 10 new ones fit before the first stride.
    text = Text(WINDOW, 0).read(32).end()
    text.overlap, text.sinks = 6, 4
    text.read(26)
    assert len(text.seen[47][0]) == WINDOW
    assert len(text.seen[48][0]) == 6 + 4 + 1
    expected = logits_of(model, out.sequences[0], text.seen, [1, 3])
    torch.testing.assert_close(torch.cat(out.logits).double(), expected[37:-1], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 10, WINDOW])
def test_last_context_length_does_not_cut_what_fits_the_window(length):
    model, ids = tiny_llama(), tokens(2, length)
    expected = model.generate(ids, max_new_tokens=1, **GREEDY).logits[0]
    with attach_memory(model, settings(last_context_length=4)) as lm:
        logits = lm.generate(ids, max_new_tokens=1, **GREEDY).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"overlap": 4}, {"overlap": 4, "sink_tokens": 2, "skip_window_start": 1}])
def test_a_conversation_equals_reading_it_turn_by_turn(changes):
    questions = [tokens(1, length, seed) for seed, length in enumerate((20, 3, 33))]
    with attach_memory(tiny_llama(), settings(top_k=8, **changes)) as lm:
        memory, read = lm.new_memory(), lm.new_memory()
        for question in questions:
            answer = lm.generate(question, memory=memory, max_new_tokens=9, update_memory=True, **GREEDY)
            turn = lm(answer.sequences, memory=read, update_memory=True)
            torch.testing.assert_close(
                torch.cat(answer.logits), turn.logits[0, question.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4
            )
            assert memory.lengths.tolist() == read.lengths.tolist()
            assert memory.tokens_seen.tolist() == read.tokens_seen.tolist()
        for index in (1, 3):
            torch.testing.assert_close(memory.layers[index].keys, read.layers[index].keys, atol=1e-4, rtol=1e-4)


def test_a_conversation_within_one_window_a_turn_equals_the_oracle():
    model = tiny_llama()
    with attach_memory(model, settings()) as lm:
        memory = lm.new_memory()
        first = lm.generate(tokens(1, 9), memory=memory, max_new_tokens=6, update_memory=True, **GREEDY).sequences
        second = lm.generate(tokens(1, 7, 1), memory=memory, max_new_tokens=8, **GREEDY)
    text = Text(WINDOW, 6, 4).read(15).end().read(15)
    ids = torch.cat([first, second.sequences], dim=1)[0]
    expected = logits_of(model, ids, text.seen, [1, 3])
    torch.testing.assert_close(torch.cat(second.logits).double(), expected[21:-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_the_memory_is_as_before_where_generating_fails():
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 60:
                raise RuntimeError("half-way")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    question = tokens(1, 5, seed=2)
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        memory = lm.ingest(tokens(1, 30, seed=1), lm.new_memory())
        before = lm(question, memory=memory).logits
        for options, error in (
            ({"max_new_tokns": 5}, ValueError),
            ({"max_new_tokens": 40, "stopping_criteria": [Fails()]}, RuntimeError),
        ):
            with pytest.raises(error):
                lm.generate(tokens(1, 30), memory=memory, update_memory=True, do_sample=False, **options)
            assert memory.lengths.tolist() == memory.tokens_seen.tolist() == [30]
            assert torch.equal(lm(question, memory=memory).logits, before)
        again = lm.generate(tokens(1, 30), memory=memory, max_new_tokens=4, do_sample=False, update_memory=True)
        assert again.shape == (1, 34)
        assert len(memory) == 64


def test_a_failed_forward_takes_its_tokens_back():
    model, config, ids = tiny_llama(), settings(overlap=4), tokens(1, 30)
    expected = Text(WINDOW, 4).read(20)
    oracle = logits_of(model, ids[0, :20], expected.seen, [1, 3])
    with attach_memory(model, config) as lm, torch.no_grad():
        cache = MemoryCache(lm.new_memory(), config, 4)
        logits = []
        for start, stop in ((0, 8), (8, 12), (12, 16), (16, 20)):
            # The last of these moves the window before it fails.
            broken = ids[:, start:stop].clone()
            broken[0, -1] = 10**6
            with pytest.raises(IndexError):
                model(input_ids=broken, past_key_values=cache)
            logits.append(model(input_ids=ids[:, start:stop], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1)[0].double(), oracle, atol=TOLERANCE, rtol=TOLERANCE)
        assert cache.memory.tokens_seen.tolist() == [12]


def test_a_forward_that_fails_in_an_upper_layer_after_a_stride_leaves_no_stale_rotation():
    model, config, ids = tiny_llama(), settings(overlap=4), tokens(1, 20)
    oracle = logits_of(model, ids[0], Text(WINDOW, 4).read(20).seen, [1, 3])
    with attach_memory(model, config) as lm, torch.no_grad():
        cache = MemoryCache(lm.new_memory(), config, 4)
        model(input_ids=ids[:, :16], past_key_values=cache)

        def fail(module, args):
            raise RuntimeError("layer 2")

        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="layer 2"):
            model(input_ids=ids[:, 16:18], past_key_values=cache)
        handle.remove()
        logits = model(input_ids=ids[:, 16:], past_key_values=cache).logits[0]
    torch.testing.assert_close(logits.double(), oracle[16:], atol=TOLERANCE, rtol=TOLERANCE)


def test_too_many_tokens_at_once_are_refused():
    model, config = tiny_llama(), settings(overlap=4)
    with attach_memory(model, config) as lm:
        cache = MemoryCache(lm.new_memory(), config, 4)
        with pytest.raises(SettingError, match=r"^input_ids=17: tokens at once do not fit"):
            model(input_ids=tokens(1, 17), past_key_values=cache)


def test_a_model_called_with_embeddings_and_a_mask_of_padding_equals_ids():
    model, config = tiny_llama(), settings(overlap=4)
    ids, mask = left_padded([6, 12], holes=True)
    with attach_memory(model, config) as lm, torch.no_grad():
        logits = []
        for inputs in ({"input_ids": ids}, {"inputs_embeds": model.model.embed_tokens(ids)}):
            cache = MemoryCache(lm.new_memory(2), config, 4)
            logits.append(model(**inputs, attention_mask=mask, past_key_values=cache).logits)
            cache.finish()
            assert cache.memory.lengths.tolist() == [6, 12]
            known = [set(text_of(cache.memory, row)) for row in range(2)]
            assert (known == [{-1}, {-1}]) == ("inputs_embeds" in inputs)
        valid = mask.bool()
        torch.testing.assert_close(logits[0][valid], logits[1][valid])
        for row in range(2):
            single = lm(ids[row][valid[row]][None]).logits[0]
            torch.testing.assert_close(logits[0][row][valid[row]], single, atol=1e-4, rtol=1e-4)


def test_reading_with_an_overlap_has_gradients():
    model, ids = tiny_llama().double(), tokens(1, 40)
    weight = model.model.layers[1].self_attn.k_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss():
        return F.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:])

    def loss_at(step):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            value = float(loss())
            weight.sub_(direction, alpha=step)
        return value

    # Without memory layers nothing is detached: the local windows alone carry the gradient.
    with attach_memory(model, settings(memory_layers=[], overlap=6, sink_tokens=1)) as lm:
        loss().backward()
        slope = float((weight.grad * direction).sum())
        numeric = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert slope == pytest.approx(numeric, rel=1e-3)
    assert abs(slope) > 1e-4


def test_reading_padded_rows_with_an_overlap_equals_each_alone():
    ids, lengths = tokens(3, 53), [53, 21, 38]
    mask = torch.zeros(3, 53, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    with attach_memory(tiny_llama(), settings(top_k=6, overlap=5, sink_tokens=2)) as lm, torch.no_grad():
        out = lm(ids, attention_mask=mask, labels=ids)
        losses = []
        for row, length in enumerate(lengths):
            single = lm(ids[row : row + 1, :length])
            torch.testing.assert_close(out.logits[row, :length], single.logits[0], atol=1e-4, rtol=1e-4)
            assert_same_row(out.memory, row, single.memory)
            losses.append(F.cross_entropy(single.logits[0, :-1], ids[row, 1:length], reduction="sum"))
    torch.testing.assert_close(out.loss, sum(losses) / sum(length - 1 for length in lengths))
