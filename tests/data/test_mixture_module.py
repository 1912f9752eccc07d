"""The data module with ``sources``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot import CrossbatchDataModule
from lightning_fot.data.mixture.dictionary import DictionaryTokens
from lightning_fot.errors import SettingError
from tests.support.byte_tokenizer import BOS, FIRST, ByteTokenizer
from tests.support.data_runs import Recorder, trainer
from tests.support.fast_tokenizer import byte_level

WINDOW = 8
TASKS: list[dict[str, Any]] = [{"kind": "dictionary", "tokens": 48}, {"kind": "passkey", "tokens": 300}]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Twelve books of 60 to 280 letters; each has its own capital letter."""
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(12):
        letter = chr(ord("A") + number)
        text = "".join(f"{letter}{chr(ord('a') + place % 26)}" for place in range(30 + number * 10))
        (folder / f"{letter}.txt").write_text(text)
    return folder


def text(path: Path, **settings: Any) -> dict[str, Any]:
    return {"kind": "text", "paths": [str(path)], **settings}


def make(tmp_path: Path, *sources: dict[str, Any], **settings: Any) -> CrossbatchDataModule:
    settings = {"window": WINDOW, "batch_size": 8, "pack": 2, "cache_dir": str(tmp_path / "cache"), **settings}
    data = CrossbatchDataModule(sources=list(sources), **settings)
    data.tokenizer_object = ByteTokenizer()
    data.report = lambda message: None
    return data


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def letters(ids: torch.Tensor) -> set[str]:
    return {letter for letter in ByteTokenizer().decode(ids.flatten().tolist()) if letter in "ABCDEFGHIJKL"}


def read_letters(data: CrossbatchDataModule, batches: int) -> set[str]:
    return set().union(*(letters(one["input_ids"]) for one in itertools.islice(data.train_dataloader(), batches)))


@pytest.mark.parametrize("layout", ["packed", "paper"])
def test_batch_t_is_the_same_however_it_is_come_to_and_on_any_number_of_ranks(
    books: Path, tmp_path: Path, layout: str
) -> None:
    sources = (text(books, weight=3), *TASKS)
    loader = iter(make(tmp_path, *sources, layout=layout).train_dataloader())
    made = [next(loader) for _ in range(120)]
    again = make(tmp_path, *sources, layout=layout)
    for step in (119, 0, 57, 58):
        assert equal(again.train_batch(step), made[step])
    halves = make(tmp_path, *sources, layout=layout, batch_size=4)
    for step in (0, 31, 119):
        parts = [halves.train_batch(step, rank, 2) for rank in range(2)]
        assert equal({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, made[step])


def test_losses_count_what_each_source_says(books: Path, tmp_path: Path) -> None:
    data = make(tmp_path, text(books), TASKS[0])
    tokens = DictionaryTokens.of(ByteTokenizer(), 64)
    for step in range(40):
        batch = data.train_batch(step)
        ids, targets = (batch[name].view(4, -1) for name in ("input_ids", "targets"))
        for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
            following = zip(row[1:], wanted[:-1], strict=True)
            assert all(target in (-100, one) for one, target in following)
        assert tokens.question not in targets
        assert tokens.key not in targets
        assert BOS not in targets


def test_held_out_documents_are_kept_from_every_source(books: Path, tmp_path: Path) -> None:
    data = make(tmp_path, text(books, heldout_fraction=0.3), text(books / "A.txt", heldout=[str(books / "K.txt")]))
    held = {letter for one in data.heldout_documents() for letter in letters(torch.tensor(one.ids))}
    assert len(held) >= 4
    read = read_letters(data, 300)
    assert not held & read
    assert held | read == set("ABCDEFGHIJKL")
    seen = set().union(*(letters(batch["input_ids"]) for batch in data.val_dataloader()))
    assert seen == held


def test_held_out_documents_of_a_length_and_validation_of_tasks(books: Path, tmp_path: Path) -> None:
    data = make(tmp_path, text(books, heldout_fraction=0.5), text(books, heldout_fraction=0.5), *TASKS)
    long = data.heldout_documents(min_tokens=150)
    assert long
    assert all(len(document) >= 150 for document in long)
    assert len(data.heldout_documents(limit=3)) == 3
    # Where there is no text, what is made for a task: dictionaries, as many as a memory may want.
    made = make(tmp_path, *TASKS).heldout_documents()
    assert [len(one) for one in made] == [48] * 256
    assert len({one.text for one in made}) == 256
    assert make(tmp_path, *TASKS).heldout_documents(min_tokens=49) == []
    assert make(tmp_path, TASKS[1]).heldout_documents() == []
    batches = list(make(tmp_path, *TASKS).val_dataloader())
    assert sum(int((batch["input_ids"] == BOS).sum()) for batch in batches) == 16


def test_sources_have_minimum_lengths_of_their_own(books: Path, tmp_path: Path) -> None:
    data = make(tmp_path, text(books, min_tokens=200), TASKS[0])
    read = read_letters(data, 200)
    heldout = {letter for one in data.heldout_documents() for letter in letters(torch.tensor(one.ids))}
    assert read <= set("HIJKL") - heldout


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("accumulate", "stop"), [(1, 13), (2, 9)])
def test_a_resumed_run_sees_the_batches_that_would_have_come(
    books: Path, tmp_path: Path, accumulate: int, stop: int
) -> None:
    sources = (text(books, weight=2), *TASKS)
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": -1}
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path / "whole", max_steps=stop + 20, **settings).fit(whole, make(tmp_path, *sources))
    trainer(tmp_path / "first", max_steps=stop, **settings).fit(first, make(tmp_path, *sources))
    path = str(tmp_path / "first" / f"step={stop}.ckpt")
    again = trainer(tmp_path / "first", max_steps=stop + 20, **settings)
    again.fit(second, make(tmp_path, *sources), ckpt_path=path, weights_only=True)
    seen = first.seen + second.seen
    assert len(seen) == (stop + 20) * accumulate
    assert all(equal(one, other) for one, other in zip(seen, whole.seen, strict=True))
    assert torch.equal(second.weight, whole.weight)
    with pytest.warns(UserWarning, match="other text than would have come"):
        make(tmp_path, text(books, weight=3), *TASKS).load_state_dict(make(tmp_path, *sources).state_dict())


def fit(data: CrossbatchDataModule, folder: Path, **settings: Any) -> Recorder:
    model = Recorder()
    trainer(folder, **{"max_epochs": -1, **settings}).fit(model, data)
    return model


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_end_of_all_sources(books: Path, tmp_path: Path) -> None:
    once = make(tmp_path, text(books, passes=1))
    tokens = sum(int((batch["input_ids"] >= FIRST).sum()) for batch in fit(once, tmp_path / "a", max_epochs=1).seen)
    trained = [path.read_text() for path in books.iterdir()]
    assert tokens == sum(map(len, trained)) - sum(len(one) for one in once.heldout_documents())
    with pytest.raises(SettingError, match=r"data\.sources.*all sources are exhausted: .* at most, but the training"):
        fit(make(tmp_path, text(books, passes=1)), tmp_path / "b", max_steps=1000)
    short = make(tmp_path, text(books, passes=1, max_document_tokens=20))
    with pytest.raises(SettingError, match="all sources are exhausted: they last for 5 batches"):
        fit(short, tmp_path / "c", max_steps=10)
    # Beyond what is encoded ahead, the end is found when it comes.
    with pytest.raises(SettingError, match="all sources are exhausted: their last passes are over"):
        short.train_batch(9)


def test_a_training_without_end_and_too_few_documents_are_told_before_it(books: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"trainer\.max_steps=-1: sets no end, and data\.sources has none"):
        fit(make(tmp_path, text(books)), tmp_path / "a")
    with pytest.raises(SettingError, match=r"have 11 documents together, but 12 are read side by side"):
        fit(make(tmp_path, text(books), batch_size=24), tmp_path / "b", max_steps=3)
    assert len(fit(make(tmp_path, text(books), TASKS[0], batch_size=24), tmp_path / "c", max_steps=3).seen) == 3


def test_an_empty_or_too_short_source_is_named(books: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.sources\[1\]\.paths.*no document has 900 tokens.*\[1\]\.min_tokens"):
        make(tmp_path, TASKS[0], text(books, min_tokens=900)).setup("fit")
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.max_document_tokens=4: is below the 8 tokens"):
        make(tmp_path, text(books, max_document_tokens=4)).setup("fit")


def test_texts_without_paths_of_their_own_are_the_modules(books: Path, tmp_path: Path) -> None:
    """So that ``--data.paths`` puts a user's documents into a shipped mixture."""
    given = make(tmp_path, {"kind": "text"}, TASKS[0], paths=[str(books)], max_documents=3)
    written = make(tmp_path, text(books, max_documents=3), TASKS[0])
    own = make(tmp_path, text(books), TASKS[0], max_documents=3)
    for step in range(5):
        assert equal(given.train_batch(step), written.train_batch(step))
        assert equal(own.train_batch(step), written.train_batch(step))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": ["books/"]}, r"data\.paths=\['books/'\]: is taken by no source: none is of kind text"),
        (
            {"max_tokens": 100, "sources": [{"kind": "text", "max_tokens": 50}]},
            r"data\.max_tokens=100: is taken by no source: each has its own",
        ),
        ({"sources": [{"kind": "book"}]}, r"data\.sources\[0\]\.kind='book': is not known"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        CrossbatchDataModule(**{"sources": TASKS, **settings})


def test_a_tokenizer_that_does_not_fit_its_model_is_told_before_training(books: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    config = LlamaConfig(vocab_size=60, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    data = CrossbatchDataModule([str(books)], tokenizer=str(folder), window=WINDOW, cache_dir=str(tmp_path / "cache"))
    data.report = lambda message: None
    with pytest.raises(SettingError, match=r"model\.backbone=.*its tokenizer gives token .* the model knows only 60"):
        data.setup("fit")
