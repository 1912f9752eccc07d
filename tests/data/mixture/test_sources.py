from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_fot.config.sources import DictionarySettings, InstructionsSettings, PasskeySettings, read_sources
from lightning_fot.data.mixture.check import check_sources
from lightning_fot.data.mixture.conversations import Template, find_conversations
from lightning_fot.data.mixture.dictionary import DictionarySource, DictionaryTokens
from lightning_fot.data.mixture.passkey import PasskeySource
from lightning_fot.data.mixture.texts import InstructionsSource
from lightning_fot.data.rows.sequences import TokenSequence
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import MissingLibraryError, SettingError
from tests.support.byte_tokenizer import BOS, EOS, PAD, ByteTokenizer
from tests.support.fast_tokenizer import CHATML, byte_level, sentence_piece

NAME = "data.sources[0]"


def first(documents: Any, count: int) -> list[TokenSequence]:
    return list(itertools.islice(documents, count))


def whole(document: TokenSequence) -> tuple[list[int], list[bool]]:
    ids, targets = document.read(0, len(document))
    return ids.tolist(), [True] * len(ids) if targets is None else targets.tolist()


def dictionary(**settings: Any) -> DictionarySource:
    return DictionarySource(DictionarySettings(setting=NAME, **settings), ByteTokenizer(), 5)


def records_of(ids: list[int], marker: int, tokens: DictionaryTokens) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Keys and values of all records that begin with ``marker``, in order."""
    found = []
    for place, one in enumerate(ids):
        if one == marker:
            assert ids[place + 5] == tokens.value
            found.append((tuple(ids[place + 1 : place + 5]), tuple(ids[place + 6 : place + 10])))
    return found


@pytest.mark.parametrize("length", [512, 101, 22])
def test_a_dictionary_defines_then_asks_and_counts_the_values_asked_for(length: int) -> None:
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)
    used = {tokens.key, tokens.value, tokens.question, *tokens.symbols.tolist()}
    assert len(used) == 64
    assert not used & {BOS, EOS, PAD}
    for document in first(dictionary(tokens=length).documents(0), 5):
        ids, targets = whole(document)
        assert len(ids) == length
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert set(ids) <= used | {BOS, EOS, PAD}
        defined = records_of(ids[: length // 2], tokens.key, tokens)
        asked = records_of(ids[length // 2 :], tokens.question, tokens)
        assert len(defined) == (length // 2 - 1) // 10
        assert len(asked) == (length - 1 - length // 2) // 10
        assert tokens.question not in ids[: length // 2]
        assert tokens.key not in ids[length // 2 :]
        table = dict(defined)
        assert len(table) == len(defined)  # keys differ
        assert all(table[key] == value for key, value in asked)
        counted = [one for one, target in zip(ids, targets, strict=True) if target]
        assert counted == [one for _, value in asked for one in value]


def test_fewer_records_are_repeated_and_their_number_grows() -> None:
    source = dictionary(records=[1, 20], grow_documents=38, tokens=512)
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)
    counts = []
    for document in first(source.documents(0), 60):
        ids, _ = whole(document)
        defined = records_of(ids[:256], tokens.key, tokens)
        assert len(defined) == 25
        counts.append(len(set(defined)))
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[19] == 10
    assert set(counts[38:]) == {20}


def test_the_number_of_records_goes_from_each_to_the_next() -> None:
    source = dictionary(records=[1, 1, 1, 7, 3], grow_documents=40)
    assert [source.records(index) for index in (0, 19, 20, 24, 25, 30, 35, 40, 99)] == [1, 1, 1, 3, 4, 7, 5, 3, 3]


def test_similar_keys_differ_from_an_earlier_one_in_one_symbol() -> None:
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)

    def nearest(similar: float) -> list[int]:
        """For every record but a document's first, in how many symbols its key differs from the nearest other."""
        found = []
        for document in first(dictionary(similar=similar).documents(0), 8):
            keys = [key for key, _ in records_of(whole(document)[0][:256], tokens.key, tokens)]
            assert len(set(keys)) == 25
            found += [min(sum(a != b for a, b in zip(one, k, strict=True)) for k in keys if k != one) for one in keys]
        return found

    alone, mixed = nearest(0.0).count(1), nearest(0.5).count(1)
    assert alone <= 2
    # Half of the keys are such copies, and what they were copied from has a near one as well.
    assert 100 < mixed < 200


def test_neighbouring_documents_make_their_keys_of_few_symbols_and_share_none() -> None:
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)
    source = dictionary(key_symbols=5, key_documents=8, records=[1, 20], grow_documents=16)
    documents = [records_of(whole(one)[0][:256], tokens.key, tokens) for one in first(source.documents(0), 40)]
    groups = [documents[start : start + 8] for start in range(0, 40, 8)]
    places = []
    for group in groups:
        keys = [key for document in group for key in {key for key, _ in document}]
        assert len(keys) == len(set(keys))
        places.append([{key[place] for key in keys} for place in range(4)])
    assert [len(set(document)) for document in documents[16:]] == [20] * 24
    assert all(len(symbols) == 5 for group in places[2:] for symbols in group)
    assert len({tuple(sorted(symbols)) for group in places[2:] for symbols in group}) == 12  # drawn for each place anew
    heldout = [records_of(whole(one)[0][:256], tokens.key, tokens) for one in first(source.heldout(), 8)]
    assert all(len({key[place] for one in heldout for key, _ in one}) == 5 for place in range(4))
    assert heldout[0] != documents[0]


def test_only_the_first_question_about_a_record_counts_where_asked() -> None:
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)
    (document,) = first(dictionary(records=7, ask="first").documents(0), 1)
    ids, targets = whole(document)
    asked = records_of(ids[256:], tokens.question, tokens)
    assert len(asked) == 25
    seen: set[tuple[int, ...]] = set()
    wanted = []
    for place, (key, value) in enumerate(asked):
        if key not in seen:
            seen.add(key)
            wanted += [(256 + 10 * place + 6 + offset, symbol) for offset, symbol in enumerate(value)]
    counted = [(place, one) for place, (one, target) in enumerate(zip(ids, targets, strict=True)) if target]
    assert counted == wanted
    assert len(wanted) == 28


def test_documents_without_end_are_drawn_by_seed_and_number() -> None:
    def texts(source: Any, held: bool = False) -> list[list[int]]:
        return [whole(one)[0] for one in first(source.heldout() if held else source.documents(0), 6)]

    passkeys = [PasskeySource(PasskeySettings(setting=NAME, tokens=300, seed=s), ByteTokenizer(), 1) for s in (0, 0, 1)]
    for one, same, other in (passkeys, [dictionary(seed=0), dictionary(seed=0), dictionary(seed=1)]):
        assert texts(one) == texts(same)
        assert len({str(ids) for source in (one, other) for ids in texts(source) + texts(source, held=True)}) == 24


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ByteTokenizer(prefix=True), byte_level()])
def test_a_passkey_document_asks_at_its_end_and_counts_the_number(tokenizer: Any) -> None:
    for answer_only in (True, False):
        settings = PasskeySettings(setting=NAME, tokens=400, answer_only=answer_only)
        for document in first(PasskeySource(settings, tokenizer, 3).documents(0), 4):
            ids, targets = whole(document)
            assert len(ids) == 400
            assert ids[0] == tokenizer.bos_token_id or tokenizer.bos_token_id is None
            assert ids[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(ids[:-1])
            told = text.partition(" The pass key is ")[2].partition(".")[0]
            assert text.endswith(f"What is the pass key? The pass key is {told}")
            counted = [one for one, target in zip(ids, targets, strict=True) if target]
            assert (tokenizer.decode(counted[:-1]) == f" {told}") == answer_only
            assert answer_only or all(targets)


def test_a_passkey_document_that_is_too_short_is_told_before_training() -> None:
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.tokens.*takes 2\d\d tokens"):
        PasskeySource(PasskeySettings(setting=NAME, tokens=100), ByteTokenizer(), 0)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is it? "},
    {"role": "assistant", "content": "A word, and more words."},
    {"role": "user", "content": "And a?"},
    {"role": "assistant", "content": "a"},
]


def write(folder: Path, *records: Any) -> InstructionsSettings:
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return InstructionsSettings(setting=NAME, paths=[str(path)])


def test_a_conversation_is_what_the_template_makes_of_it_and_answers_count(tmp_path: Path) -> None:
    settings = write(tmp_path, {"messages": TALK, "documents": ["First document.", "Second\ndocument. "]})
    tokenizer = byte_level()
    (conversation,) = find_conversations(settings)
    encoded = Template(TextEncoder(tokenizer, tmp_path / "cache"), None, NAME).encode(conversation)
    assert encoded is not None
    ids, targets = encoded
    expected = [dict(one, content=one["content"].strip()) for one in TALK]
    expected[1]["content"] = "First document.\n\nSecond\ndocument.\n\nWhat is it?"
    text = tokenizer.apply_chat_template(expected, tokenize=False)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    counted = tokenizer.decode(ids[targets].tolist())
    assert counted == "A word, and more words.<|im_end|>a<|im_end|>"
    again = Template(TextEncoder(tokenizer, tmp_path / "cache"), None, NAME).encode(conversation)
    assert again is not None
    assert np.array_equal(again[0], ids)
    assert np.array_equal(again[1], targets)


def test_a_space_before_the_answer_belongs_to_its_first_word(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[x] {{ m['content'] }} [y]{% else %}"
        " {{ m['content'] }} </s>{% endif %}{% endfor %}"
    )
    tokenizer = sentence_piece(template)
    turns = [{"role": "user", "content": "Some words."}, {"role": "assistant", "content": "more words, and more."}]
    (conversation,) = find_conversations(write(tmp_path, {"messages": turns}))
    encoded = Template(TextEncoder(tokenizer), None, NAME).encode(conversation)
    assert encoded is not None
    ids, targets = encoded
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    counted = tokenizer.convert_ids_to_tokens(ids[targets].tolist())
    assert "".join(counted) == "▁more▁words,▁and▁more.▁</s>"


def test_control_tokens_spelled_out_do_not_become_control_tokens(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]}
    said: list[str] = []
    settings = write(tmp_path, {"messages": TALK}, {"messages": TALK}, bad, bad, bad)
    source = InstructionsSource(settings, TextEncoder(byte_level()), 0, said.append)
    documents = list(source.documents(0)) + list(source.heldout())
    assert len(documents) == 2
    assert any("conversations that spell out control tokens" in one for one in said)


def test_conversations_are_split_and_shuffled(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": f"{n}?"}, TALK[2]]} for n in range(30)]
    source = InstructionsSource(write(tmp_path, *records), TextEncoder(byte_level()), 0, lambda _: None)
    orders = [[whole(one)[0] for one in source.documents(number)] for number in (0, 0, 1)]
    held = [whole(one)[0] for one in source.heldout()]
    assert orders[0] == orders[1] != orders[2]
    assert len(held) == 3
    assert len({str(ids) for ids in orders[2] + held}) == 30
    assert source.count == 27


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "x"}, "line 2 has no list of messages under the key 'messages'; its keys are text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2 has no answer"),
        ({"messages": [{"role": "cook", "content": "x"}]}, "line 2 has a message of role 'cook'"),
        ({"messages": [{"role": "user"}]}, "line 2 has a message without a text"),
        ({"messages": TALK, "documents": [3]}, "line 2 has 'documents' that are no list of texts"),
        ({"messages": [TALK[1], {"role": "assistant", "content": " "}]}, "line 2 has an empty answer"),
    ],
)
def test_a_line_that_is_no_conversation_is_told_by_number(tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(SettingError, match=rf"data\.sources\[0\]\.paths=.*{problem}"):
        find_conversations(write(tmp_path, {"messages": TALK}, record))


def test_a_missing_or_unfit_chat_template_is_told_before_training(tmp_path: Path) -> None:
    settings = write(tmp_path, {"messages": TALK})
    encoder = TextEncoder(byte_level(chat_template=None))
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.chat_template=None: is missing"):
        Template(encoder, None, NAME)
    with pytest.raises(SettingError, match=r"chat_template='absent\.jinja': cannot be read"):
        Template(encoder, "absent.jinja", NAME)
    (tmp_path / "own.jinja").write_text(CHATML)
    (conversation,) = find_conversations(settings)
    assert Template(encoder, str(tmp_path / "own.jinja"), NAME).encode(conversation) is not None
    with pytest.raises(SettingError, match="loses its system turn in the chat template"):
        Template(encoder, "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}", NAME).encode(conversation)
    with pytest.raises(SettingError, match=r"refused by the chat template \(no\)"):
        Template(encoder, "{{ raise_exception('no') }}", NAME).encode(conversation)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"kind": "text"}, r"data\.sources=.*must be a list of sources"),
        ([], r"data\.sources=\[\]: must be a list"),
        (["books/"], r"data\.sources\[0\]='books/': must hold settings"),
        ([{"paths": ["x"]}], r"data\.sources\[0\]\.kind=None: is missing.*Kinds: text, huggingface, dictionary"),
        ([{"kind": "passkeys"}], r"data\.sources\[0\]\.kind='passkeys': is not known\. Did you mean passkey\?"),
        (
            [{"kind": "passkey"}, {"kind": "text", "min_token": 3}],
            r"data\.sources\[1\]\.min_token=3: is not a setting of kind text\. Did you mean min_tokens\? Its settings:",
        ),
        ([{"kind": "passkey", "setting": "x"}], r"\.setting='x': is not a setting of kind passkey"),
        ([{"kind": "text", "weight": 0}], r"\.weight=0: must be a number above 0"),
        ([{"kind": "text", "weight": "3"}], r"\.weight='3': must be a number above 0"),
        ([{"kind": "text", "weight": None}], r"\.weight=None: must have a value\. Leave it out for 1\.0"),
        ([{"kind": "text", "passes": 0}], r"\.passes=0: must be a whole number of at least 1"),
        ([{"kind": "text", "heldout_fraction": 1}], r"\.heldout_fraction=1: must be a number above 0 and below 1"),
        ([{"kind": "text", "paths": [3]}], r"\.paths=\[3\]: must be a list of files"),
        ([{"kind": "text", "paths": ["no such"]}], r"data\.sources\[0\]\.paths='no such': does not exist"),
        ([{"kind": "dictionary", "records": 26}], r"\.records=26: must be from 1 to 25"),
        ([{"kind": "dictionary", "records": [3]}], r"must be a number or a list of two or more"),
        ([{"kind": "dictionary", "similar": 1}], r"\.similar=1: must be a number of at least 0 and below 1"),
        ([{"kind": "dictionary", "key_symbols": 5}], r"key_symbols=5: gives 625 different keys for 32 documents of 25"),
        ([{"kind": "dictionary", "key_symbols": 62}], r"\.key_symbols=62: is more than the 61 symbols"),
        ([{"kind": "dictionary", "key_symbols": 6, "similar": 0.5}], r"\.similar=0\.5: cannot be had together with"),
        ([{"kind": "dictionary", "ask": "some"}], r"\.ask='some': is not known.*Choose all or first"),
        ([{"kind": "dictionary", "vocabulary": 5}], r"\.vocabulary=5: gives 16 different keys for 25 records"),
        ([{"kind": "instructions"}], r"\.paths=None: is missing"),
        ([{"kind": "huggingface"}], r"data\.sources\[0\]\.dataset=None: is missing"),
        ([{"kind": "passkey", "tokens": None}], r"\.tokens=None: must have a value"),
    ],
)
def test_wrong_sources_are_told_before_torch(sources: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check_sources(sources)


def test_a_single_path_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (settings,) = read_sources([{"kind": "text", "paths": str(tmp_path)}])
    assert settings == read_sources([{"kind": "text", "paths": [str(tmp_path)]}])[0]
    check_sources([{"kind": "text", "paths": str(tmp_path)}])


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_a_missing_library_is_told_with_its_installation() -> None:
    with pytest.raises(MissingLibraryError, match=r"data\.sources\[0\].*'datasets'.*pip install 'lightning-fot\[data"):
        check_sources([{"kind": "huggingface", "dataset": "owner/name"}])
