from __future__ import annotations

from typing import Any

import pytest

from lightning_fot.data.mixture.passkey import LARGEST_NUMBER, passkey_prompt
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_tokenizer
from tests.support.byte_tokenizer import ByteTokenizer


@pytest.fixture(params=["bytes", "prefix", "byt5"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "byt5":
        return load_tokenizer("tiny-random-llama")
    return ByteTokenizer(prefix=request.param == "prefix")


@pytest.mark.parametrize("length", [300, 511, 512, 2000])
def test_prompt_has_exactly_the_length_and_holds_the_number(tokenizer: Any, length: int) -> None:
    for seed in range(5):
        example = passkey_prompt(tokenizer, length, seed)
        assert len(example.prompt_ids) == length
        text = tokenizer.decode(example.prompt_ids)
        assert f"The pass key is {example.number}. Remember it. {example.number} is the pass key." in text
        assert text.endswith("What is the pass key? The pass key is")
        assert tokenizer.decode(example.answer_ids) == f" {example.number}"
        assert 1 <= example.number <= LARGEST_NUMBER


def test_the_place_is_spread_and_the_seed_decides() -> None:
    tokenizer = ByteTokenizer()
    examples = [passkey_prompt(tokenizer, 4000, seed) for seed in range(60)]
    depths = sorted(example.depth for example in examples)
    assert depths[0] < 0.1
    assert depths[-1] > 0.9
    assert 0.35 < sum(depths) / len(depths) < 0.65
    assert len({example.number for example in examples}) > 50
    assert examples[7] == passkey_prompt(tokenizer, 4000, 7)


def test_a_start_token_comes_first_when_the_tokenizer_puts_one() -> None:
    tokenizer = ByteTokenizer()
    assert passkey_prompt(tokenizer, 400, 0).prompt_ids[0] == tokenizer.bos_token_id


def test_too_short_a_prompt_says_how_long_it_must_be() -> None:
    with pytest.raises(SettingError, match=r"evaluation\.passkey_tokens=100: .*takes 2\d\d tokens.*Use (256|320)"):
        passkey_prompt(ByteTokenizer(), 100, 0)
