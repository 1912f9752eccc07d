from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fot.data.text import tokens
from lightning_fot.data.text.documents import LONG_BYTES, Corpus, Item, cut_into_parts, split_documents
from lightning_fot.data.text.readers import find_documents
from lightning_fot.data.text.tokens import TextEncoder, Vocabulary
from lightning_fot.errors import SettingError
from lightning_fot.pretrained import load_tokenizer
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fast_tokenizer import byte_level, sentence_piece

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


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", [TEXT, PROSE])
def test_pieces_in_threads_agree_with_the_tokenizer_itself(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], text: str
) -> None:
    tokenizer = make()
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 300)
    encoder = TextEncoder(tokenizer)
    encoder.threads = 3
    parts = list(encoder.stream([text[:1000], text[1000:]]))
    assert len(parts) > 20
    assert np.concatenate(parts).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    # The tokenizer's own state is not touched, and does not matter.
    tokenizer.truncation_side = "left"
    tokenizer(text, truncation=True, max_length=5)
    assert encoder.encode([text])[0].tolist() == np.concatenate(parts).tolist()


def test_a_document_on_disk_has_the_ids_of_one_in_memory(tmp_path: Path) -> None:
    reads: list[int] = []

    def texts() -> Iterator[str]:
        reads.append(1)
        yield from (TEXT, PROSE)

    tokenizer = byte_level()
    stored = TextEncoder(tokenizer, tmp_path).encode_on_disk(texts)
    assert isinstance(stored, np.memmap)
    assert stored.tolist() == tokenizer(TEXT + PROSE, add_special_tokens=False)["input_ids"]
    assert len(list(tmp_path.rglob("*.*"))) == 1
    again = TextEncoder(tokenizer, tmp_path).encode_on_disk(texts)
    assert len(reads) == 3  # hash and ids, then the hash alone
    assert np.array_equal(again, stored)
    (tmp_path / "file").write_text("in the way")
    for encoder in (TextEncoder(tokenizer, tmp_path / "file"), TextEncoder(tokenizer)):
        assert np.array_equal(encoder.encode_on_disk(texts), stored)


def test_a_large_document_is_cut_and_sliced_like_a_small_one(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(PROSE)
    (source,) = find_documents([str(tmp_path / "book.txt")]).documents
    encoder = TextEncoder(ByteTokenizer(), tmp_path / "cache")
    for limit in (None, 9_000):
        small, large = (Corpus(encoder, 10, limit, large_bytes=size) for size in (10**9, 1000))
        for item in (Item(source), Item(source, 5, 700), Item(source, 20)):
            one, other = small.ids(item), large.ids(item)
            assert one is not None
            assert other is not None
            assert one.tolist() == other.tolist()
        assert isinstance(large.ids(Item(source)), np.memmap)
        assert small.cut == large.cut


_BOUNDED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from tests.support.fast_tokenizer import byte_level
from lightning_fot.data.text.documents import Corpus, Item
from lightning_fot.data.text.readers import find_documents
from lightning_fot.data.rows.plan import Epoch, RowPlan
from lightning_fot.data.rows.sequences import TextSequence
from lightning_fot.data.text.tokens import TextEncoder, Vocabulary
from lightning_fot.errors import SettingError
from pathlib import Path
(source,) = find_documents([sys.argv[2]]).documents
encoder = TextEncoder(byte_level(), Path(sys.argv[3]))
encoder.encode(["Some words, and more words.\\n" * 60_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = Corpus(encoder, 10).ids(Item(source))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
epoch = Epoch(iter([TextSequence(ids, 1, 2)]), RowPlan(4, 256, 4))
assert epoch.skip(10_000) == 10_000
epoch.next()
print(len(ids), peak // 1024)
"""


@pytest.mark.slow
def test_a_document_over_100_mb_is_encoded_in_bounded_memory(tmp_path: Path) -> None:
    size, path = 0, tmp_path / "book.txt"
    with open(path, "w") as file:
        for number in itertools.count():
            size += file.write(f"{number}\n{PROSE}\n")
            if size > 110 * 1024 * 1024:
                break
    command = [
        sys.executable,
        "-c",
        _BOUNDED,
        str(Path(__file__).resolve().parents[3]),
        str(path),
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, peak_mb = map(int, done.stdout.split())
    assert count > 10**7
    assert peak_mb < 200  # text and ids together would be more than 250, a tokenizer's own record of them far more


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path) -> None:
    encoder = TextEncoder(ByteTokenizer(), tmp_path, vocabulary=Vocabulary("my/model", 100))
    assert encoder.encode(["AAA" * 2000])[0].max() < 100
    with pytest.raises(SettingError, match=r"model\.backbone='my/model': its tokenizer gives token 124.*only 100"):
        encoder.encode(["yyy" * 2000])


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
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert np.array_equal(encoder.encode([TEXT])[0], ids)


def test_an_altered_cache_file_is_encoded_again(tmp_path: Path) -> None:
    ids, _ = TextEncoder(ByteTokenizer(), tmp_path).encode([TEXT])
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for _ in range(2):
        assert np.array_equal(TextEncoder(ByteTokenizer(), tmp_path).encode([TEXT])[0], ids)


def test_an_altered_document_on_disk_is_encoded_again(tmp_path: Path) -> None:
    ids = np.array(TextEncoder(ByteTokenizer(), tmp_path).encode_on_disk(lambda: [TEXT]))
    (file,) = tmp_path.rglob("*.document")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert np.array_equal(TextEncoder(ByteTokenizer(), tmp_path).encode_on_disk(lambda: [TEXT]), ids)
    assert file.read_bytes() != bytes(content)


def test_a_cache_file_under_the_name_of_another_is_encoded_again(tmp_path: Path) -> None:
    texts, found = [TEXT, TEXT[::-1]], []
    for text in texts:
        encoder = TextEncoder(ByteTokenizer(), tmp_path)
        found.append((encoder.encode([text])[0].copy(), np.array(encoder.encode_on_disk(lambda text=text: [text]))))
    for suffix in ("piece", "document"):
        files = sorted(tmp_path.rglob(f"*.{suffix}"))
        assert len(files) >= 2
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, contents[1:] + contents[:1], strict=True):
            file.write_bytes(content)
    for text, (ids, document) in zip(texts, found, strict=True):
        encoder = TextEncoder(ByteTokenizer(), tmp_path)
        assert np.array_equal(encoder.encode([text])[0], ids)
        assert np.array_equal(encoder.encode_on_disk(lambda text=text: [text]), document)


def test_a_cache_of_older_versions_is_read(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    ids, _ = TextEncoder(tokenizer, tmp_path).encode([TEXT])
    document = np.array(TextEncoder(tokenizer, tmp_path).encode_on_disk(lambda: [TEXT]))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        kept = np.frombuffer(path.read_bytes()[:-32], np.int32)
        if path.suffix == ".document":
            kept.tofile(path.with_suffix(".int32"))
        else:
            np.save(path.with_suffix(".npy"), kept)
        path.unlink()
    tokenizer.characters = 0
    assert np.array_equal(TextEncoder(tokenizer, tmp_path).encode([TEXT])[0], ids)
    assert np.array_equal(TextEncoder(tokenizer, tmp_path).encode_on_disk(lambda: [TEXT]), document)
    # Some words tell tokenizers apart; the text itself is not among them.
    assert tokenizer.characters < len(TEXT)


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


@pytest.mark.parametrize(
    "make", [ByteTokenizer, byte_level, sentence_piece, lambda: load_tokenizer("tiny-random-llama")]
)
def test_half_a_surrogate_pair_is_the_replacement_character(make: Callable[[], Any], tmp_path: Path) -> None:
    encoder = TextEncoder(make(), tmp_path)
    whole = encoder.encode(["cut \ufffd here, and 𝄞"])[0].tolist()
    assert encoder.encode(["cut \ud83d here, and \ud834\udd1e"])[0].tolist() == whole
    assert encoder.encode_controls("cut \ud83d") == encoder.encode_controls("cut \ufffd")
