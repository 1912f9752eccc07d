"""What must hold of reading and decoding whatever the input: one sentence and one test for each statement."""

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_fot import attach_memory
from lightning_fot.model.passes.local_window import MemoryCache
from tests.support.models import VOCABULARY, WINDOW, settings, tiny_llama, tokens
from tests.support.oracle import dense_logits

LAYERS = [1, 3]
EVEN, RAGGED = [16] * 4, [16, 16, 16, 1, 10]
# fp32 against fp64: what the plain backbone differs by on as many tokens is 2e-5.
FP32 = 4e-5
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# Grouped and multi-head, both kinds of positions, both dtypes: every pair of values in four cases.
pairwise = pytest.mark.parametrize(
    ("kv_heads", "positions", "dtype"),
    [
        (2, "first", torch.float32),
        (4, "none", torch.float32),
        (2, "none", torch.bfloat16),
        (4, "first", torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def read_windows(lm, ids, lengths):
    """Logits (1, T, V) of windows of the given lengths, and the memory after them."""
    memory = lm.new_memory()
    parts = [lm(part, memory=memory, update_memory=True).logits for part in ids.split(lengths, dim=1)]
    return torch.cat(parts, dim=1), memory


def assert_close_to_oracle(model, ids, logits, expected):
    """fp32 within rounding. bf16: as near as the plain backbone in bf16 is to exact attention over the same tokens."""
    error = logits[0].double() - expected
    if logits.dtype == torch.float32:
        assert float(error.abs().max()) < FP32
        return
    plain = model(ids).logits[0].double() - dense_logits(model, ids[0].tolist(), ids.shape[1], [])
    assert float(error.square().mean().sqrt()) < 1.3 * float(plain.square().mean().sqrt())


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, WINDOW])
def test_with_an_empty_memory_a_window_is_the_backbone_bit_for_bit(kv_heads, dtype, length):
    model, ids = tiny_llama(kv_heads).to(dtype), tokens(2, length)
    expected = model(ids).logits
    with attach_memory(model, settings()) as lm:
        assert torch.equal(lm(ids).logits, expected)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("positions", ["first", "none"])
@pytest.mark.parametrize(
    ("dtype", "top_k"),
    # In bf16 the k-th and the next neighbour change places at times: only all of them have one right answer.
    [(torch.float32, 4096), (torch.float32, 6), (torch.bfloat16, 4096)],
)
@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
def test_reading_window_by_window_is_one_dense_pass(kv_heads, positions, dtype, top_k, lengths):
    """All neighbours, or the k of the largest inner products: equal to one pass whose masks say so."""
    model = tiny_llama(kv_heads).to(dtype)
    ids = tokens(1, sum(lengths))
    expected = dense_logits(model, ids[0].tolist(), lengths, LAYERS, positions, top_k=top_k)
    with attach_memory(model, settings(positions=positions, top_k=top_k)) as lm:
        logits, memory = read_windows(lm, ids, lengths)
        if lengths == EVEN:
            assert torch.equal(lm(ids).logits, logits)
    assert len(memory) == sum(lengths)
    assert_close_to_oracle(model, ids, logits, expected)


@pytest.mark.parametrize(("positions", "copies"), [("first", 1), ("first", 3), ("none", 2)])
def test_copies_of_the_memory_add_their_logarithm(positions, copies):
    """n copies of every stored pair are the pair with log n added to its score."""
    model, ids = tiny_llama(), tokens(1, 3 * WINDOW)
    expected = dense_logits(model, ids[0].tolist(), WINDOW, LAYERS, positions, copies=copies)
    with attach_memory(model, settings(positions=positions)) as lm:
        memory, parts = lm.new_memory(), []
        for part in ids.split(WINDOW, dim=1):
            before = len(memory)
            out = lm(part, memory=memory)
            parts.append(out.logits[0])
            new = {
                n: (layer.keys[:, :, before:], layer.values[:, :, before:]) for n, layer in out.memory.layers.items()
            }
            for _ in range(copies):
                memory.append(new)
    assert float((torch.cat(parts).double() - expected).abs().max()) < FP32


def catch_projected_keys(model):
    """Hooks the key projections of the memory layers: lists of (1, T, G, D), one a call."""
    caught = {layer: [] for layer in LAYERS}
    for layer in LAYERS:
        model.model.layers[layer].self_attn.k_proj.register_forward_hook(
            lambda module, args, output, layer=layer: caught[layer].append(output.unflatten(-1, (-1, 16)))
        )
    return caught


@pairwise
@pytest.mark.parametrize("rope", ["plain", "yarn"])
@pytest.mark.parametrize("overlap", [0, 4])
def test_stored_keys_are_the_projected_keys_bit_for_bit(kv_heads, positions, dtype, rope, overlap):
    """Never rotated; times the attention scale where the rotary embedding has one and is used."""
    model = tiny_llama(kv_heads, **({"rope_parameters": YARN} if rope == "yarn" else {})).to(dtype)
    scale = model.model.rotary_emb.attention_scaling
    assert (scale == 1) == (rope == "plain")
    with attach_memory(model, settings(positions=positions, overlap=overlap, top_k=8)) as lm:
        caught = catch_projected_keys(model)
        memory = lm(tokens(1, 3 * WINDOW + 5)).memory
    for layer in LAYERS:
        expected = torch.cat(caught[layer], dim=1).transpose(1, 2)
        if positions == "first":
            expected = expected * torch.tensor(scale).to(dtype)
        assert torch.equal(memory.layers[layer].keys, expected)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("positions", ["first", "none"])
def test_local_position_changes_what_a_query_finds_under_first_alone(kv_heads, positions):
    """One token at two places of a window: other scores on memory keys under ``first``, the same under ``none``."""
    question = tokens(1, 12, seed=1)
    question[0, 9] = question[0, 2]
    with attach_memory(tiny_llama(kv_heads), settings(memory_layers=[0], positions=positions)) as lm:
        memory = lm.ingest(tokens(1, 40), lm.new_memory())
        with lm.record_queries() as recorded:
            lm(question, memory=memory)
    # (G, R·T, D): layer 0 sees the token's embedding and nothing else.
    queries = recorded[0][0].unflatten(1, (-1, 12))
    scores = torch.einsum("grtd,gmd->grtm", queries, memory.layers[0].keys[0])
    difference = (scores[:, :, 2] - scores[:, :, 9]).abs()
    if positions == "none":
        assert float(difference.max()) == 0
    else:
        assert float(difference.amax(-1).min()) > 0.1


@pairwise
@pytest.mark.parametrize("top_k", [4096, 8])
def test_the_order_of_the_memory_changes_nothing(kv_heads, positions, dtype, top_k):
    with attach_memory(tiny_llama(kv_heads).to(dtype), settings(positions=positions, top_k=top_k)) as lm:
        memory, shuffled = lm.ingest(tokens(1, 64), lm.new_memory()), lm.new_memory()
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        shuffled.append({n: (part.keys[:, :, order], part.values[:, :, order]) for n, part in memory.layers.items()})
        question = tokens(1, 12, seed=1)
        expected, logits = (lm(question, memory=held).logits for held in (memory, shuffled))
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)


@pytest.mark.slow
@pairwise
@pytest.mark.parametrize(("overlap", "sinks", "top_k"), [(0, 0, 4096), (0, 0, 8), (4, 1, 8)])
def test_a_token_changes_nothing_before_it(kv_heads, positions, dtype, overlap, sinks, top_k):
    """Exactly 0 within its window and in the windows before, with two memory layers."""
    config = settings(positions=positions, overlap=overlap, sink_tokens=sinks, top_k=top_k)
    ids = tokens(1, 60)
    with attach_memory(tiny_llama(kv_heads).to(dtype), config) as lm:
        logits = lm(ids).logits
        for place in (17, 37):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % VOCABULARY
            difference = (lm(other).logits - logits).abs()[0].amax(-1)
            assert float(difference[:place].max()) == 0
            assert float(difference[place:].min()) > 0


@pytest.mark.parametrize("positions", ["first", "none"])
@pytest.mark.parametrize("layout", ["packed", "paper"])
def test_a_row_of_a_crossbatch_changes_nothing_before_it(positions, layout):
    """Exactly 0 within the row, in rows before it, and (``paper``) in every other row of the batch."""
    ids, previous = tokens(4, WINDOW), tokens(4, WINDOW, seed=1)[:, None]
    other = ids.clone()
    other[2, 9] = (other[2, 9] + 1) % VOCABULARY
    with attach_memory(tiny_llama(), settings(positions=positions)) as lm:
        if layout == "packed":
            table, extra = [[], [0], [1, 0], [2, 1]], ()
        else:
            table, extra = [[0, 1], [1, 2], [2, 3], [3, 0]], (previous,)
        difference = (lm.crossbatch(ids, table, *extra) - lm.crossbatch(other, table, *extra)).abs().amax(-1)
    assert float(difference[:2].max()) == 0
    assert float(difference[2, :9].max()) == 0
    assert float(difference[2, 9:].min()) > 0
    assert (float(difference[3].max()) > 0) == (layout == "packed")


@pytest.mark.slow
@pairwise
@pytest.mark.parametrize(("overlap", "sinks"), [(0, 0), (4, 1)])
def test_rows_of_a_batch_do_not_see_each_other(kv_heads, positions, dtype, overlap, sinks):
    """Exactly 0, through windows, memory and decoding, whatever the other row holds."""
    ids = tokens(2, 50)
    other = torch.stack([ids[0], tokens(1, 50, seed=5)[0]])
    config = settings(positions=positions, overlap=overlap, sink_tokens=sinks, top_k=8)
    with attach_memory(tiny_llama(kv_heads).to(dtype), config) as lm:
        assert torch.equal(lm(ids).logits[0], lm(other).logits[0])
        first, second = (lm.ingest(rows, lm.new_memory(2)) for rows in (ids, other))
        for layer in LAYERS:
            assert torch.equal(first.layers[layer].keys[0], second.layers[layer].keys[0])
        question = tokens(2, 5, seed=2)
        assert torch.equal(lm(question, memory=first).logits[0], lm(question, memory=second).logits[0])


def multi_head_twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function with every KV head repeated for each query head of its group."""
    twin = tiny_llama(kv_heads=4)
    state = {name: part.clone() for name, part in model.state_dict().items()}
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("positions", ["first", "none"])
@pytest.mark.parametrize(("top_k", "overlap"), [(4096, 0), (6, 0), (6, 4)])
def test_grouped_queries_equal_their_multi_head_expansion(positions, top_k, overlap):
    """Query heads of a group search one KV head's index, and find what each would find in a copy of its own."""
    model, ids = tiny_llama(kv_heads=2), tokens(2, 55)
    config = settings(positions=positions, top_k=top_k, overlap=overlap)
    with attach_memory(model, config) as lm:
        grouped = lm(ids)
    with attach_memory(multi_head_twin(model), config) as lm:
        expanded = lm(ids)
    torch.testing.assert_close(grouped.logits, expanded.logits, atol=FP32, rtol=0)
    assert grouped.memory.layers[3].keys.shape[1] == 2
    assert expanded.memory.layers[3].keys.shape[1] == 4


def test_kv_heads_search_their_own_keys():
    """Other keys in one KV head's bank change what the query heads of its group find, and nothing of the others'."""
    generator = torch.Generator().manual_seed(0)
    with attach_memory(tiny_llama(), settings(top_k=4)) as lm:
        layer = lm.ingest(tokens(1, 40), lm.new_memory()).layers[3]
        queries = torch.randn(1, 2, 6, 16, generator=generator)
        keys = layer.keys.clone()
        keys[:, 0] = torch.randn(keys[:, 0].shape, generator=generator)
        other = lm.new_memory()
        other.append(dict.fromkeys(LAYERS, (keys, layer.values)))
    before, after = layer.search(queries, 4), other.layers[3].search(queries, 4)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:, 0], after[:, 0])


@pytest.mark.parametrize(("kv_heads", "positions"), [(2, "first"), (4, "none")])
@pytest.mark.parametrize(("overlap", "sinks", "length"), [(0, 0, WINDOW), (8, 0, 45), (4, 2, 45)])
def test_decoding_token_by_token_equals_one_pass(kv_heads, positions, overlap, sinks, length):
    """Within a window as the backbone, past an overflow as reading with the same overlap and sinks."""
    model, ids = tiny_llama(kv_heads), tokens(2, length)
    config = settings(positions=positions, overlap=overlap, sink_tokens=sinks, top_k=12)
    with attach_memory(model, config) as lm:
        expected = lm(ids).logits
        cache = MemoryCache(lm.new_memory(2), config, 4)
        steps = [model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(length)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=FP32, rtol=0)


@pairwise
@pytest.mark.parametrize("chunk", [1, 3])
def test_every_token_is_local_or_in_memory_and_never_both(kv_heads, positions, dtype, chunk):
    """After each step the memory followed by the local window is every key so far, in order and once."""
    model, ids = tiny_llama(kv_heads).to(dtype), tokens(1, 40)
    config = settings(positions=positions, overlap=4, top_k=8)
    with attach_memory(model, config) as lm:
        caught = catch_projected_keys(model)
        cache, read = MemoryCache(lm.new_memory(), config, 4), 0
        for part in ids.split(chunk, dim=1):
            model(input_ids=part, past_key_values=cache)
            read += part.shape[1]
            for layer in LAYERS:
                local = cache.local_layers[layer].keys
                assert 4 <= local.shape[2] <= WINDOW or read < 4
                held = torch.cat([cache.memory.layers[layer].keys, local], dim=2)
                assert torch.equal(held, torch.cat(caught[layer], dim=1).transpose(1, 2))
    assert len(cache.memory) > WINDOW


def padded(lengths, width, kind, seed=0):
    """Ids (B, width) and mask with tokens of each row at the left, the right, or here and there."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        if kind == "holes":
            mask[row, torch.randperm(width, generator=generator)[:length]] = 1
        else:
            mask[row, slice(width - length, width) if kind == "left" else slice(0, length)] = 1
    return tokens(len(lengths), width, seed), mask


@pytest.mark.parametrize(("kv_heads", "positions"), [(2, "first"), (4, "none")])
@pytest.mark.parametrize(
    ("kind", "overlap", "sinks"),
    [("left", 0, 0), ("right", 0, 0), ("holes", 0, 0), ("left", 4, 1), ("right", 4, 0), ("holes", 4, 1)],
)
def test_padding_is_never_stored_nor_found_and_takes_no_slot(kv_heads, positions, kind, overlap, sinks):
    """A ragged batch equals each row alone: logits, and every stored key and value; with few neighbours, so that a
    stored pad would take the place of one."""
    lengths = [53, 2, 38]
    ids, mask = padded(lengths, 53, kind)
    config = settings(positions=positions, top_k=5, overlap=overlap, sink_tokens=sinks)
    with attach_memory(tiny_llama(kv_heads), config) as lm:
        out = lm(ids, attention_mask=mask)
        assert out.memory.lengths.tolist() == lengths
        for row, length in enumerate(lengths):
            own = mask[row].bool()
            alone = lm(ids[row][own][None])
            torch.testing.assert_close(out.logits[row][own], alone.logits[0], atol=FP32, rtol=0)
            for layer in LAYERS:
                for name in ("keys", "values"):
                    batched, single = (getattr(m.layers[layer], name) for m in (out.memory, alone.memory))
                    torch.testing.assert_close(batched[row, :, :length], single[0], atol=FP32, rtol=0)


def test_saved_weights_are_the_backbones_and_give_equal_logits():
    """``state_dict`` has the backbone's keys and shapes; what is saved attached is read by a plain model, and back."""
    model, ids = tiny_llama(), tokens(1, 50)
    plain = {name: part.shape for name, part in model.state_dict().items()}
    with attach_memory(model, settings(top_k=8)) as lm:
        state = {name: part.clone() for name, part in lm.state_dict().items()}
        expected = lm(ids).logits
    assert {name: part.shape for name, part in state.items()} == plain
    other = tiny_llama(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    with attach_memory(other, settings(top_k=8)) as lm:
        assert torch.equal(lm(ids).logits, expected)
