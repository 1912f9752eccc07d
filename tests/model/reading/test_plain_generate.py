"""Transformers' own ``generate`` and pipeline beside a memory: what the attached model's own ``generate`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_backbone, load_tokenizer

WINDOW = 64


@pytest.fixture(scope="module")
def lm() -> Iterator[Any]:
    config = MemoryConfig(memory_layers=[1, 3], window=WINDOW, top_k=8, retriever="exact")
    with attach_memory(load_backbone("tiny-random-llama"), config) as attached:
        yield attached


@pytest.fixture(scope="module")
def memory(lm: Any) -> Any:
    return lm.ingest(drawn(1, 500), lm.new_memory())


def drawn(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("length", [1, 40, WINDOW])
def test_it_continues_as_the_attached_model_does(lm: Any, memory: Any, length: int) -> None:
    ids, stored = drawn(1, length, seed=length), len(memory)
    found = lm.model.generate(ids, **OPTIONS, **lm.beside(memory))
    assert torch.equal(found, lm.generate(ids, memory, **OPTIONS))
    assert len(memory) == stored
    assert not torch.equal(found, lm.model.generate(ids, **OPTIONS))


def test_a_prompt_may_be_longer_than_the_window(lm: Any, memory: Any) -> None:
    """Against forwards by hand, in parts of the size that is given."""
    ids, given = drawn(1, 3 * WINDOW + 5), lm.beside(memory)
    chunk = given["prefill_chunk_size"]
    found = lm.model.generate(ids, **OPTIONS, **given)
    cache, text = lm.beside(memory)["past_key_values"], ids
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            logits = lm.model(input_ids=part, past_key_values=cache).logits
        for _ in range(OPTIONS["max_new_tokens"]):
            chosen = logits[:, -1:].argmax(-1)
            text = torch.cat([text, chosen], dim=1)
            logits = lm.model(input_ids=chosen, past_key_values=cache).logits
    assert torch.equal(found, text)


def test_beams_have_a_row_of_memory_each(lm: Any, memory: Any) -> None:
    ids = drawn(1, 40)
    rows = memory.select_rows(torch.zeros(3, dtype=torch.int64))
    found = lm.model.generate(ids, **OPTIONS, num_beams=3, **lm.beside(rows))
    assert torch.equal(found, lm.generate(ids, memory, **OPTIONS, num_beams=3))


def test_rows_of_a_batch_have_a_row_of_memory_each(lm: Any, memory: Any) -> None:
    rows = memory.select_rows(torch.tensor([0, 0]))
    ids, mask = drawn(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :15] = 0
    found = lm.model.generate(ids, attention_mask=mask, **OPTIONS, **lm.beside(rows))
    assert torch.equal(found, lm.generate(ids, rows, attention_mask=mask, **OPTIONS))
    assert torch.equal(found[1, 15:], lm.generate(ids[1:, 15:], memory, **OPTIONS)[0])


def test_a_pipeline_answers_beside_a_memory(lm: Any, memory: Any) -> None:
    tokenizer = load_tokenizer("tiny-random-llama")
    pipe: Any = transformers.pipeline("text-generation", model=lm.model, tokenizer=tokenizer)
    text = "word7 word9 and what else?"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    expected = lm.generate(ids, memory, max_new_tokens=20, do_sample=False)
    said = pipe(text, max_new_tokens=20, do_sample=False, return_full_text=False, **lm.beside(memory))
    assert said[0]["generated_text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_what_does_not_fit_is_refused(lm: Any, memory: Any) -> None:
    config = MemoryConfig(memory_layers=[1], window=WINDOW, retriever="exact")
    with (
        attach_memory(load_backbone("tiny-random-llama"), config) as other,
        pytest.raises(SettingError, match="memory"),
    ):
        other.beside(memory)
    # A prompt that is longer than the window, without being cut.
    cache = lm.beside(memory)["past_key_values"]
    with pytest.raises(SettingError, match="do not fit a window"):
        lm.model.generate(drawn(1, WINDOW + 1), past_key_values=cache, max_new_tokens=2)
