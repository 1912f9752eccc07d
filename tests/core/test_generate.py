"""Generating beside a memory: token by token equals reading, across moves of the local window."""

import pytest
import torch

from lightning_fot import attach_memory
from lightning_fot.errors import SettingError
from tests.core.models import settings, tiny_llama, tokens


@pytest.mark.parametrize("positions", ["first", "none"])
@pytest.mark.parametrize(("overlap", "sinks"), [(4, 0), (4, 2), (8, 1)])
def test_greedy_tokens_are_the_argmax_of_reading_them(positions, overlap, sinks):
    config = settings(overlap=overlap, sink_tokens=sinks, positions=positions, top_k=12)
    with attach_memory(tiny_llama(), config) as lm, torch.no_grad():
        generated = lm.generate(tokens(2, 30), max_new_tokens=25, do_sample=False)
        read = lm(generated)
        assert read.memory.lengths.tolist() == [55, 55]
        assert torch.equal(read.logits[:, 29:-1].argmax(-1), generated[:, 30:])


def test_without_overlap_generation_still_keeps_half_a_window():
    with attach_memory(tiny_llama(), settings(top_k=12)) as lm, torch.no_grad():
        generated = lm.generate(tokens(1, 20), max_new_tokens=30, do_sample=False)
    with attach_memory(tiny_llama(), settings(top_k=12, overlap=8)) as lm, torch.no_grad():
        assert torch.equal(lm(generated).logits[:, 19:-1].argmax(-1), generated[:, 20:])


def test_left_padded_prompts_within_a_window_equal_each_alone():
    ids = tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with attach_memory(tiny_llama(), settings()) as lm:
        together = lm.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        alone = lm.generate(ids[:1, 4:], max_new_tokens=5, do_sample=False)
    assert torch.equal(together[0, 10:], alone[0, 6:])


def test_a_beam_of_one_memory_finds_at_least_the_greedy_likelihood():
    text, prompt = tokens(1, 40), tokens(1, 6, seed=1)
    config = settings(overlap=4, top_k=8)

    def likelihood(lm, ids, memory):
        logits = lm(ids, memory=memory).logits.log_softmax(-1)
        return float(logits[0, 5:-1].gather(-1, ids[0, 6:, None]).sum())

    with attach_memory(tiny_llama(), config) as lm, torch.no_grad():
        memory = lm.ingest(text, lm.new_memory())
        greedy = lm.generate(prompt, memory=memory, max_new_tokens=20, do_sample=False)
        beams = lm.generate(prompt, memory=memory, max_new_tokens=20, do_sample=False, num_beams=6)
        assert len(memory) == 40
        # The beam's score is reproduced by reading its tokens: rows were reordered with their memories.
        scored = lm.generate(
            prompt,
            memory=memory,
            max_new_tokens=20,
            do_sample=False,
            num_beams=6,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert float(scored.sequences_scores[0]) == pytest.approx(likelihood(lm, scored.sequences, memory), abs=1e-3)
        assert likelihood(lm, beams, memory) >= likelihood(lm, greedy, memory) - 1e-3


def test_update_memory_continues_a_conversation():
    with attach_memory(tiny_llama(), settings(top_k=8, overlap=4)) as lm:
        memory = lm.new_memory()
        first = lm.generate(tokens(1, 20), memory=memory, max_new_tokens=7, do_sample=False, update_memory=True)
        assert first.shape[1] == 27
        assert len(memory) == 27
        lm.generate(tokens(1, 3, seed=1), memory=memory, max_new_tokens=2, do_sample=False, update_memory=True)
        assert len(memory) == 32


def test_sampling_is_seeded():
    with attach_memory(tiny_llama(), settings(top_k=8)) as lm:
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(lm.generate(tokens(1, 5), max_new_tokens=12, do_sample=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_padding_on_the_right_is_refused():
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with attach_memory(tiny_llama(), settings()) as lm, pytest.raises(SettingError, match="Pad on the left"):
        lm.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_a_failed_forward_takes_its_tokens_back():
    from lightning_fot.cache import MemoryCache

    model = tiny_llama()
    config = settings(overlap=4)
    with attach_memory(model, config) as lm, torch.no_grad():
        cache = MemoryCache(lm.new_memory(), config, 4)
        ids = tokens(1, 12)
        model(input_ids=ids[:, :8], past_key_values=cache)
        expected = None
        for attempt in range(2):
            if attempt == 0:
                with pytest.raises(IndexError):
                    model(input_ids=torch.full((1, 4), 10**6), past_key_values=cache)
            else:
                expected = model(input_ids=ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(expected, lm(ids).logits[:, 8:], atol=1e-5, rtol=1e-5)
