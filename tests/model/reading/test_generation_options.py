"""Options of transformers' generate beside a memory: what works is as without one, what cannot is refused by name."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.memory import Memory
from lightning_fot.model.passes.local_window import MemoryCache
from tests.support.models import VOCABULARY, settings, tiny_llama, tokens

LOGITS = {"return_dict_in_generate": True, "output_logits": True}


class Streamer:
    """Keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": False},
        {"num_beams": 4, "do_sample": False, "num_return_sequences": 3, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": False, "guidance_scale": 1.5},
        {"do_sample": False, "prefill_chunk_size": 2},
        {"num_beams": 2, "do_sample": False, "eos_token_id": [7, 30, 61, 88], "pad_token_id": 0},
    ],
)
def test_within_a_window_and_without_memory_every_option_gives_what_the_backbone_gives(options):
    model, ids = tiny_llama(), tokens(2, 8)
    torch.manual_seed(0)
    expected = model.generate(ids, max_new_tokens=8, **options)
    with attach_memory(model, settings()) as lm:
        torch.manual_seed(0)
        assert torch.equal(lm.generate(ids, max_new_tokens=8, **options), expected)


def next_logprobs(lm, sequence, memory):
    """Log-probabilities (V,) after one sequence, read alone from its start."""
    out = lm.generate(torch.tensor([sequence]), memory=memory, max_new_tokens=1, do_sample=False, **LOGITS)
    return out.logits[0][0].log_softmax(-1)


def beams_by_hand(lm, prompt, memory, count, steps):
    """Beam search by definition: every beam is read anew at every step."""
    beams = [(0.0, list(prompt))]
    for _ in range(steps):
        longer = []
        for score, sequence in beams:
            logprobs = next_logprobs(lm, sequence, memory)
            best = logprobs.topk(count)
            longer += [
                (score + float(logprob), [*sequence, int(token)])
                for logprob, token in zip(best.values, best.indices, strict=True)
            ]
        beams = sorted(longer, reverse=True)[:count]
    return beams


@pytest.mark.slow
def test_beams_that_outgrow_the_window_are_those_of_a_search_by_hand():
    rows, steps = [22, 13], 12
    ids, mask = tokens(2, 22, seed=4), torch.ones(2, 22, dtype=torch.int64)
    mask[1, : 22 - rows[1]] = 0
    with attach_memory(tiny_llama(), settings(top_k=6, overlap=3, sink_tokens=2)) as lm:
        memory = lm.ingest(tokens(2, 40, seed=5), lm.new_memory(2))
        out = lm.generate(
            ids, memory=memory, attention_mask=mask, max_new_tokens=steps, do_sample=False, num_beams=3,
            num_return_sequences=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert memory.lengths.tolist() == [40, 40]
        for row, count in enumerate(rows):
            own = lm.ingest(tokens(2, 40, seed=5)[row : row + 1], lm.new_memory())
            expected = beams_by_hand(lm, ids[row, 22 - count :].tolist(), own, 3, steps)
            for place, (score, sequence) in enumerate(expected):
                assert out.sequences[3 * row + place, 22 - count :].tolist() == sequence
                assert float(out.sequences_scores[3 * row + place]) == pytest.approx(score, abs=1e-3)
        reordered = torch.arange(6)[None] != out.beam_indices.clamp_min(0).T
        assert bool(reordered[9:].any()), "no beam was reordered after a stride: the test proves nothing"


def test_beams_leave_a_shared_memory_alone_until_their_own_tokens_leave_the_window(monkeypatch):
    selected = []
    select_rows = Memory.select_rows

    def counted(self, rows):
        selected.append(rows.tolist())
        return select_rows(self, rows)

    monkeypatch.setattr(Memory, "select_rows", counted)
    options = {"num_beams": 3, "do_sample": False}
    with attach_memory(tiny_llama(), settings(top_k=6, overlap=8)) as lm:
        memory = lm.ingest(tokens(1, 40), lm.new_memory())
        # 14 of the prompt and 2 new ones fill the window; 8 of the prompt leave with the third.
        lm.generate(tokens(1, 14, seed=1), memory=memory, max_new_tokens=9, **options)
        assert selected == [[0, 0, 0]]
        lm.generate(tokens(1, 14, seed=1), memory=memory, max_new_tokens=30, **options)
    assert len(selected) > 2
    assert all(rows != [0, 1, 2] for rows in selected)


def test_reordering_rows_by_hand_gives_each_the_text_of_the_row_it_took():
    model, config = tiny_llama(), settings(top_k=6, overlap=4)
    ids, order = tokens(3, 40), torch.tensor([2, 0, 2])
    with attach_memory(model, config) as lm, torch.no_grad():
        cache = MemoryCache(lm.new_memory(3), config, 4)
        for start in range(0, 40, 4):
            logits = model(input_ids=ids[:, start : start + 4], past_key_values=cache).logits
            if start == 20:
                before = cache.memory
                cache.reorder_cache(torch.arange(3))
                assert cache.memory is before
                cache.reorder_cache(order)
                ids[:, :24] = ids[order, :24]
        cache.finish()
        expected = lm(ids)
        torch.testing.assert_close(logits, expected.logits[:, -4:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            cache.memory.layers[3].values, expected.memory.layers[3].values, atol=1e-4, rtol=1e-4
        )


def test_several_samples_of_a_padded_prompt_over_strides_are_likely_as_their_own_reading_says():
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :9] = 0
    with attach_memory(tiny_llama(), settings(top_k=6, overlap=4)) as lm:
        torch.manual_seed(0)
        out = lm.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=True, num_return_sequences=3, **LOGITS)
        assert out.sequences.shape == (6, 45)
        assert len({tuple(row) for row in out.sequences.tolist()}) == 6
        for row in range(6):
            start = 9 if row < 3 else 0
            with torch.no_grad():
                read = lm(out.sequences[row : row + 1, start:]).logits[0, 19 - start : -1]
            logits = torch.stack([step[row] for step in out.logits])
            torch.testing.assert_close(logits, read, atol=1e-4, rtol=1e-4)


def test_sampling_is_seeded():
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(lm.generate(tokens(1, 5), max_new_tokens=30, do_sample=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_streamer_gets_the_prompt_and_every_token():
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :12] = 0
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        streamer = Streamer()
        out = lm.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.parts[0], ids)
    assert torch.equal(torch.stack(streamer.parts[1:], dim=1), out[:, 30:])


@pytest.mark.slow
def test_lengths_and_settings_in_a_generation_config():
    ids = tokens(1, 12)
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        expected = lm.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
        assert torch.equal(lm.generate(ids, max_length=32, num_beams=3, do_sample=False), expected)
        config = GenerationConfig(max_new_tokens=20, num_beams=3, do_sample=False)
        assert torch.equal(lm.generate(ids, generation_config=config), expected)
        with pytest.raises(SettingError, match="num_beams=3"):
            lm.generate(ids, generation_config=config, update_memory=True, memory=lm.new_memory())
        lm.model.generation_config.num_beams = 3
        lm.model.generation_config.max_new_tokens = 20
        assert torch.equal(lm.generate(ids), expected)


@pytest.mark.slow
def test_an_end_token_counts_wherever_it_is_set():
    ids = tokens(2, 12)
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        free = lm.generate(ids, max_new_tokens=30, do_sample=False)[:, 12:].tolist()
        end, stops = next(
            (token, [row.index(token) for row in free])
            for token in range(VOCABULARY)
            if all(token in row for row in free) and len({row.index(token) for row in free}) == 2
        )

        def seen(**options):
            memory = lm.new_memory(2)
            options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **options}
            lm.generate(ids, memory=memory, update_memory=True, **options)
            return memory.tokens_seen.tolist()

        expected = [12 + stop + 1 for stop in stops]
        assert seen(eos_token_id=end) == expected
        assert seen(eos_token_id=torch.tensor(end)) == expected
        config = GenerationConfig(eos_token_id=[end], pad_token_id=0, max_new_tokens=30, do_sample=False)
        assert seen(generation_config=config) == expected
        # A criterion of transformers' own kind takes the place of the one that the option would make.
        assert seen(eos_token_id=1000, stopping_criteria=[EosTokenCriteria(end)]) == expected
        lm.model.generation_config.eos_token_id = end
        assert seen() == expected
        assert seen(eos_token_id=None) == [42, 42]
        assert seen(eos_token_id=None, stopping_criteria=[MaxLengthCriteria(20)]) == [20, 20]


def test_stop_strings_end_rows():
    letters = [chr(ord("a") + token) for token in range(VOCABULARY)]
    characters = Tokenizer(BPE({letter: token for token, letter in enumerate(letters)}, []))
    characters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    ids = tokens(2, 12)
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        free = lm.generate(ids, max_new_tokens=24, do_sample=False)[:, 12:].tolist()
        stop = "".join(letters[token] for token in free[0][8:11])
        memory = lm.new_memory(2)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "update_memory": True}
        lm.generate(ids, memory=memory, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert memory.tokens_seen.tolist() == [12 + 11, 12 + 24]


def test_an_output_object_has_scores_and_the_cache():
    ids = tokens(2, 20)
    with attach_memory(tiny_llama(), settings(top_k=6)) as lm:
        out = lm.generate(ids, max_new_tokens=10, do_sample=False, output_scores=True, **LOGITS)
        assert len(out.scores) == len(out.logits) == 10
        assert torch.equal(torch.stack(out.scores, dim=1).argmax(-1), out.sequences[:, 20:])
        assert isinstance(out.past_key_values, MemoryCache)
        # All but the last token, which was drawn and not read.
        cache = out.past_key_values
        assert (cache.memory.lengths + torch.tensor(cache.widths)).tolist() == [29, 29]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", tokens(1, 4)),
        ("inputs_embeds", torch.zeros(1, 4, 64)),
        ("past_key_values", object()),
        ("position_ids", tokens(1, 4)),
        ("cache_implementation", "static"),
        ("custom_generate", "someone/repository"),
        ("assistant_model", object()),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 2),
        ("use_mtp", True),
        ("token_healing", True),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("constraints", [object()]),
        ("force_words_ids", [[3]]),
        ("use_cache", False),
        ("num_beam_groups", 2),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(name, value):
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match=f"^{name}="):
        lm.generate(tokens(1, 4), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("inputs", tokens(1, 4)), ("inputs_embeds", torch.zeros(1, 4, 64))])
def test_other_names_of_the_prompt_in_its_place_are_refused_by_name(name, value):
    with attach_memory(tiny_llama(), settings()) as lm:
        with pytest.raises(SettingError, match=rf"{name}=.*Give input_ids"):
            lm.generate(**{name: value}, max_new_tokens=2)
        with pytest.raises(SettingError, match=r"input_ids=None: leaves nothing to continue"):
            lm.generate(max_new_tokens=2)


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 5}, {"pad_token_id": 9}, {"eos_token_id": 5, "pad_token_id": 9}])
def test_what_follows_a_row_that_a_criterion_has_ended_is_padding(ends):
    class Ended(StoppingCriteria):
        """Ends the first row after 3 new tokens."""

        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 11, False])

    model, ids = tiny_llama(), tokens(2, 8)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [5], "stopping_criteria": [Ended()]}
    with attach_memory(model, settings()) as lm:
        out = lm.generate(ids, **options, **ends)
    assert out[0, 11:].tolist() == 5 * [ends.get("pad_token_id", ends.get("eos_token_id", 0))]
    # With an end token transformers does the same, for rows that any criterion has ended.
    expected = model.generate(ids, **options, **{"eos_token_id": 5, **ends})
    assert torch.equal(out[:, :11], expected[:, :11])
    assert torch.equal(out[1], expected[1])
    if "eos_token_id" in ends:
        assert torch.equal(out, expected)


def test_an_option_that_the_model_brings_with_it_is_refused_too():
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.model.generation_config.prompt_lookup_num_tokens = 3
        with pytest.raises(SettingError, match=r"^prompt_lookup_num_tokens=3"):
            lm.generate(tokens(1, 4))
        lm.generate(tokens(1, 4), prompt_lookup_num_tokens=None, num_beam_groups=1, use_cache=True, max_new_tokens=1)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_continuations_cannot_be_kept(options):
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match=r"^update_memory=True"):
        lm.generate(tokens(1, 4), memory=lm.new_memory(), update_memory=True, **options)


def test_padding_on_the_right_is_refused():
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match="Pad on the left"):
        lm.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_transformers_own_refusals_come_before_the_prompt_is_read():
    class Nothing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    read = []
    with attach_memory(tiny_llama(), settings()) as lm:
        lm.model.model.register_forward_pre_hook(lambda module, args: read.append(True))
        for options in (
            {"max_new_tokns": 3},
            {"num_return_sequences": 2, "do_sample": False},
            {"num_beams": 2, "streamer": Streamer()},
            {"temperature": -1.0, "do_sample": True},
        ):
            with pytest.raises((ValueError, TypeError)):
                lm.generate(tokens(1, 100), stopping_criteria=[Nothing()], **{"max_length": 120, **options})
    assert not read
