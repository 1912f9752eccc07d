from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from byte_tokenizer import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.data import tokens
from lightning_fot.data.documents import LONG_BYTES, Corpus, Item, cut_into_parts, split_documents
from lightning_fot.data.readers import find_documents
from lightning_fot.data.tokens import TextEncoder
from lightning_fot.pretrained import load_tokenizer

PROSE = "\n\n".join(f"Paragraph {number} has some words, and more words." for number in range(800))
TEXT = "".join(f"def function_{number}(x):\n    return x + {number}\n\n\n" for number in range(800))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("text", [TEXT, PROSE, "x" * 9000, "字" * 5000 + "\n" + "字" * 5000])
def test_pieces_give_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch, prefix: bool, text: str) -> None:
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 500)
    tokenizer = ByteTokenizer(prefix)
    ids, cut = TextEncoder(tokenizer).encode([text[:1000], text[1000:1001], text[1001:]])
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.dtype == np.int32
    assert not cut


@pytest.mark.parametrize("text", [TEXT, PROSE])
def test_pieces_agree_with_a_byte_level_bpe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([TEXT, PROSE], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 300)
    encoder = TextEncoder(fast)
    pieces = list(encoder._cut([text], None))
    assert len(pieces) > 20
    seen = encoder.encode([text])[0].tolist()
    assert seen == fast(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prefix", [False, True])
def test_only_as_much_is_encoded_as_is_asked_for(prefix: bool) -> None:
    tokenizer = ByteTokenizer(prefix)
    encoder = TextEncoder(tokenizer)
    tokenizer.characters = 0
    ids, cut = encoder.encode(itertools.repeat(TEXT), max_tokens=50)
    assert len(ids) == 50
    assert cut
    assert tokenizer.characters < 10_000


def test_a_text_of_just_the_limit_is_not_cut() -> None:
    encoder = TextEncoder(ByteTokenizer())
    assert encoder.encode(["abcd"], max_tokens=4)[1] is False
    assert encoder.encode(["abcde"], max_tokens=4)[1] is True


def test_the_cache_is_read_again_and_keyed_by_tokenizer(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    ids, _ = TextEncoder(tokenizer, tmp_path).encode([TEXT])
    encoder = TextEncoder(tokenizer, tmp_path)
    tokenizer.characters = 0
    again, _ = encoder.encode([TEXT])
    assert tokenizer.characters == 0
    assert np.array_equal(ids, again)
    other, _ = TextEncoder(ByteTokenizer(prefix=True), tmp_path).encode([TEXT])
    assert len(other) == len(ids) + 1
    assert not list(tmp_path.rglob("*.part"))


def test_half_a_cache_file_is_encoded_again(tmp_path: Path) -> None:
    encoder = TextEncoder(ByteTokenizer(), tmp_path)
    ids, _ = encoder.encode([TEXT])
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert np.array_equal(encoder.encode([TEXT])[0], ids)


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    encoder = TextEncoder(ByteTokenizer(), tmp_path / "file", said.append)
    encoder.encode([TEXT])
    encoder.encode([TEXT])
    assert len(said) == 1
    assert "cannot be written" in said[0]


def test_control_tokens_spelled_out_in_a_document_are_plain_text() -> None:
    tokenizer = load_tokenizer("tiny-random-llama")
    ids, _ = TextEncoder(tokenizer).encode(["a</s>b"])
    assert len(ids) == 6
    assert tokenizer.eos_token_id not in ids.tolist()


def test_corpus_leaves_out_cuts_and_counts(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 100)
    (tmp_path / "short.txt").write_text("x" * 9)
    corpus = Corpus(TextEncoder(ByteTokenizer()), min_tokens=10, max_document_tokens=60)
    long, short = find_documents([str(tmp_path)]).documents
    ids = corpus.ids(Item(long))
    assert ids is not None
    assert len(ids) == 60
    part = corpus.ids(Item(long, 10, 15))
    assert part is not None
    assert part.tolist() == ids[10:15].tolist()
    assert corpus.ids(Item(short)) is None
    assert not corpus.is_long_enough(Item(short))
    assert len(corpus.cut) == len(corpus.short) == 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=80), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_disjoint_complete_and_holds_out_a_long_document(sizes: list[int], fraction: float, seed: int) -> None:
    train, heldout = split_documents(sizes, fraction, seed)
    assert train
    assert heldout
    assert sorted(train + heldout) == list(range(len(sizes)))
    assert max(sizes[number] for number in heldout) >= min(max(sizes), LONG_BYTES) / 2
    assert (train, heldout) == split_documents(sizes, fraction, seed)


def test_split_of_one_document_holds_nothing_out() -> None:
    assert split_documents([5], 0.5, 0) == ([0], [])


@given(st.lists(st.integers(2, 200), min_size=1, max_size=5), st.integers(1, 12))
def test_parts_cover_every_token_once(lengths: list[int], parts: int) -> None:
    stretches = cut_into_parts(lengths, parts)
    for number, length in enumerate(lengths):
        mine = sorted((start, stop) for one, start, stop in stretches if one == number)
        assert [token for start, stop in mine for token in range(start, stop)] == list(range(length))
    assert all(stop - start >= 2 for _, start, stop in stretches)
    assert len(stretches) >= parts or all(stop - start < 4 for _, start, stop in stretches)
