"""Tokens that are spelled alike have one number, in vocabularies of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from lightning_fot.data.text.spelling import spelling
from lightning_fot.pretrained import load_tokenizer


def made(kind: str) -> Any:
    words = {
        "bytes": ["Ġcat", "cat", "Cat", "ĠCAT", "dog", "Ġ.", "."],
        "pieces": ["▁cat", "cat", "▁Cat", "CAT", "dog", "▁.", "."],
        "parts": ["##cat", "cat", "Cat", "##CAT", "dog", "##.", "."],
    }[kind]
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    if kind == "parts":
        tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "pieces", "parts"])
def test_case_and_the_space_before_do_not_count(kind: str) -> None:
    tokenizer = made(kind)
    found = spelling(tokenizer)
    assert len(found) == len(tokenizer) + 1
    cats, dog = set(found[1:5].tolist()), int(found[5])
    assert len(cats) == 1
    assert dog not in cats | {-1}
    assert found[6:].tolist() == [-1, -1, -1]
    assert spelling(tokenizer) is found


def test_of_a_real_vocabulary() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    found = spelling(tokenizer)
    for one, other in (("Boiler", " boiler"), ("THE", " the"), ("7", "7")):
        first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other))
        if len(first) == len(second) == 1:
            assert found[first].tolist() == found[second].tolist() != [-1]
    the, comma = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" the", ","))
    assert found[the].tolist() == found[tokenizer("The", add_special_tokens=False)["input_ids"]].tolist()
    assert found[comma].tolist() == [-1]
