from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot import CrossbatchDataModule
from lightning_fot.errors import SettingError
from tests.support.byte_tokenizer import BOS, EOS, FIRST, PAD, ByteTokenizer
from tests.support.data_runs import Recorder, trainer

WINDOW = 8


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Twelve books of 60 to 280 letters; every letter pair tells which book and where."""
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(12):
        letter = chr(ord("A") + number)
        text = "".join(f"{letter}{chr(ord('a') + place % 26)}" for place in range(30 + number * 10))
        (folder / f"{letter}.txt").write_text(text)
    return folder


def make(paths: Path | list[Path], tmp_path: Path, **settings: Any) -> CrossbatchDataModule:
    listed = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    settings = {"window": WINDOW, "batch_size": 4, "pack": 2, "cache_dir": str(tmp_path / "cache"), **settings}
    data = CrossbatchDataModule(listed, **settings)
    data.tokenizer_object = ByteTokenizer()
    data.report = lambda message: None
    return data


def said(data: CrossbatchDataModule) -> str:
    return "\n".join(data.messages)


def decoded(batch: dict[str, torch.Tensor]) -> list[str]:
    return [ByteTokenizer().decode(row) for row in batch["input_ids"].tolist()]


def books_in(text: str) -> set[str]:
    return {letter for letter in text if letter.isupper()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_reads_every_training_document_once_and_no_held_out_one(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path)
    data.setup("fit")
    ids = torch.cat([batch["input_ids"].view(2, -1) for batch in data.train_dataloader()], dim=1)
    read = sorted(ByteTokenizer().decode([t for t in part if t >= FIRST]) for part in _split(ids))
    heldout = {document.text for document in data.heldout_documents()}
    assert len(heldout) == 1
    texts = {path.read_text() for path in books.iterdir()}
    assert sorted(texts - heldout) == read
    assert int((ids == BOS).sum()) == 11


def _split(ids: torch.Tensor) -> Iterator[list[int]]:
    """Documents of each stream: what is between start tokens."""
    for stream in ids.tolist():
        starts = [place for place, token in enumerate(stream) if token == BOS]
        for start, stop in zip(starts, [*starts[1:], len(stream)], strict=True):
            yield [token for token in stream[start:stop] if token != PAD]


def test_batches_have_their_form(books: Path, tmp_path: Path) -> None:
    batch = make(books, tmp_path).train_batch(0)
    assert batch.keys() == {"input_ids", "targets"}
    assert all(value.shape == (4, WINDOW) and value.dtype == torch.int64 for value in batch.values())
    assert torch.equal(batch["targets"][0, :-1], batch["input_ids"][0, 1:])
    assert int(batch["targets"][0, -1]) == int(batch["input_ids"][1, 0])
    data = make(books, tmp_path, layout="paper", prev_windows=3)
    for step in (0, 5):
        batch = data.train_batch(step)
        assert batch["previous_ids"].shape == (4, 3, WINDOW)
        assert batch["previous_valid"].dtype == torch.bool
        assert batch["previous_valid"].tolist() == [[step > 0] * 3] * 4
    assert torch.equal(batch["previous_ids"][:, -1], data.train_batch(4)["input_ids"])


def test_documents_meet_as_eos_bos_and_a_start_is_no_target(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path, pack=1, batch_size=1)
    ids, targets = [], []
    for batch in data.train_dataloader():
        ids += batch["input_ids"].flatten().tolist()
        targets += batch["targets"].flatten().tolist()
    places = [place for place, token in enumerate(ids) if token == BOS]
    assert places[0] == 0
    assert all(ids[place - 1] == EOS and targets[place - 1] == -100 for place in places[1:])
    assert targets.count(EOS) == 11
    assert BOS not in targets


def test_epochs_are_shuffled_anew_and_the_seed_decides(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path)
    loader = data.train_dataloader()
    first, second = ([decoded(batch) for batch in loader] for _ in range(2))
    assert first != second
    assert [decoded(batch) for batch in make(books, tmp_path).train_dataloader()] == first
    assert decoded(make(books, tmp_path, seed=5).train_batch(0)) != first[0]
    assert decoded(data.train_batch(len(first))) == second[0]


def test_two_ranks_read_different_documents(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path)
    for step in range(8):
        texts = ["".join(decoded(data.train_batch(step, rank, 2))) for rank in range(2)]
        assert not books_in(texts[0]) & books_in(texts[1])


@pytest.mark.parametrize("pack", [1, 2, 4])
def test_one_document_is_split_by_position(tmp_path: Path, pack: int) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"{number:04d} " for number in range(400))
    path.write_text(text)
    data = make(path, tmp_path, pack=pack)
    data.setup("fit")
    (heldout,) = data.heldout_documents()
    assert len(heldout.text) == 200
    assert text.endswith(heldout.text)
    ids = torch.cat([batch["input_ids"].view(4 // pack, -1) for batch in data.train_dataloader()], dim=1)
    read = "".join(sorted(ByteTokenizer().decode(stream) for stream in ids.tolist()))
    assert read == text[:1800]
    assert "one document" in said(data)
    assert ("parts" in said(data)) == (pack < 4)


def test_two_documents_are_one_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A" * 500)
    (tmp_path / "b.txt").write_text("B" * 400)
    data = make([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path)
    data.setup("fit")
    (heldout,) = data.heldout_documents()
    text = "".join("".join(decoded(batch)) for batch in data.train_dataloader())
    assert books_in(text) | books_in(heldout.text) == {"A", "B"}
    assert not books_in(text) & books_in(heldout.text)
    assert "cut into parts" in said(data)


def test_short_documents_beside_a_book_leave_one_document(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("tiny")
    (tmp_path / "book.txt").write_text("Book " * 100)
    data = make([tmp_path / f"{name}.txt" for name in (0, 1, 2, "book")], tmp_path)
    data.setup("fit")
    assert "3 documents shorter than 8 tokens" in said(data)
    assert "one document, book.txt" in said(data)


def test_given_held_out_documents_are_kept_out_of_training(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path, heldout=[str(books / "C.txt"), str(books / "D.txt")])
    data.setup("fit")
    assert {letter for one in data.heldout_documents() for letter in books_in(one.text)} == {"C", "D"}
    read = "".join("".join(decoded(batch)) for batch in data.train_dataloader())
    assert books_in(read) == set("ABEFGHIJKL")
    assert "2 documents of data.paths are held out" in said(data)


@pytest.mark.parametrize("sources", [None, [{"kind": "text"}]], ids=["paths", "mixture"])
def test_all_documents_may_be_held_out_where_nothing_is_trained(
    books: Path, tmp_path: Path, sources: list[dict[str, Any]] | None
) -> None:
    data = make(books, tmp_path, heldout=[str(books)], sources=sources)
    data.setup(None)
    assert {letter for one in data.heldout_documents() for letter in books_in(one.text)} == set("ABCDEFGHIJKL")
    with pytest.raises(SettingError, match=r"heldout.*leaves no document.*trainer\.max_steps=0"):
        data.setup("fit")


def test_held_out_documents_of_a_length(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path, heldout_fraction=0.5)
    everything = data.heldout_documents()
    assert len(everything) == 6
    assert all(len(document) == len(document.text) for document in everything)
    long = data.heldout_documents(min_tokens=150)
    assert {document.name for document in long} == {one.name for one in everything if len(one) >= 150}
    assert long[0].name == data.heldout_documents(min_tokens=150, limit=1)[0].name
    assert data.heldout_documents(min_tokens=10**6) == []


def test_validation_batches_are_the_held_out_documents(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path, heldout_fraction=0.5)
    loader = data.val_dataloader()
    passes = [[decoded(batch) for batch in loader] for _ in range(2)]
    assert passes[0] == passes[1]
    read = {letter for batch in passes[0] for row in batch for letter in books_in(row)}
    assert read == {letter for document in data.heldout_documents() for letter in books_in(document.text)}


def test_limits_are_kept_and_said(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path, max_documents=4, min_tokens=100, max_document_tokens=100)
    data.setup("fit")
    list(data.train_dataloader())
    assert "Cut at max_document_tokens=100: 4 (" in said(data)
    assert len(data.heldout_documents()) == 1
    limited = make(books, tmp_path, max_tokens=200)
    tokens = sum(int((batch["input_ids"] >= FIRST).sum()) for batch in limited.train_dataloader())
    assert 190 <= tokens <= 200


@pytest.mark.parametrize("sources", [None, [{"kind": "text"}]], ids=["paths", "mixture"])
def test_documents_are_cut_for_training_and_validation_and_read_whole_by_evaluation(
    tmp_path: Path, sources: list[dict[str, Any]] | None
) -> None:
    for name in ("read", "held", "others"):
        (tmp_path / f"{name}.txt").write_text(name[0] * 500)
    data = make(
        tmp_path / "read.txt", tmp_path, heldout=str(tmp_path / "held.txt"), max_document_tokens=64, sources=sources
    )
    (whole,) = data.heldout_documents(min_tokens=400)
    assert whole.text == "h" * 500
    (other,) = data.other_documents([str(tmp_path / "others.txt")], "evaluation.distractor_paths")
    assert other.text == "o" * 500
    # A batch leaves off the last token, whose successor nobody knows.
    assert 60 <= "".join(row for batch in data.val_dataloader() for row in decoded(batch)).count("h") <= 64


def test_text_is_encoded_only_as_far_as_it_is_read(books: Path, tmp_path: Path) -> None:
    for number in range(40):
        (books / f"extra{number}.txt").write_text("x" * 5000)
    data = make(books, tmp_path)
    tokenizer = ByteTokenizer()
    data.tokenizer_object = tokenizer
    data.setup("fit")
    next(iter(data.train_dataloader()))
    assert tokenizer.characters < 40_000


def test_a_binary_folder_and_short_documents_are_errors(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "x.bin").write_bytes(b"\0")
    with pytest.raises(SettingError, match=r"data\.paths.*binary"):
        make(folder, tmp_path).setup("fit")
    (folder / "x.txt").write_text("short")
    with pytest.raises(SettingError, match=r"no document has 8 tokens.*data\.min_tokens or model\.memory\.window"):
        make(folder, tmp_path).setup("fit")
    (folder / "x.txt").write_text("one document alone")
    with pytest.raises(SettingError, match="one document of 18 tokens, too short for a training and a held-out part"):
        make(folder, tmp_path, window=10).setup("fit")


def test_less_text_than_a_batch_is_an_error_when_training(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Book " * 10)
    data = make(tmp_path / "book.txt", tmp_path)
    data.setup("test")
    with pytest.raises(SettingError, match=r"data\.batch_size=8: a batch takes 64 tokens.*have 43"):
        make(tmp_path / "book.txt", tmp_path, batch_size=8).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "pack": 4}, r"data\.batch_size=6: is not a multiple of pack=4\. Try 4"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"window": 1}, r"data\.window=1"),
        ({"heldout_fraction": 1.0}, r"data\.heldout_fraction"),
        ({"layout": "other"}, r"data\.layout"),
        ({"max_document_tokens": 4}, r"data\.max_document_tokens=4: is below the 8 tokens"),
        ({"max_documents": 0}, r"data\.max_documents=0"),
    ],
)
def test_settings_are_checked_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make(tmp_path, tmp_path, **settings)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("accumulate", "stop", "extra"),
    [
        (1, 5, {}),
        (2, 3, {}),
        (1, 40, {}),  # in a later epoch
        (2, 5, {"limit_train_batches": 7}),
        (1, 6, {"limit_val_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}),
    ],
)
def test_a_resumed_run_sees_the_batches_that_would_have_come(
    books: Path, tmp_path: Path, accumulate: int, stop: int, extra: dict[str, Any]
) -> None:
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": -1, **extra}
    whole = Recorder()
    trainer(tmp_path / "whole", max_steps=stop + 10, **settings).fit(whole, make(books, tmp_path))
    first = Recorder()
    trainer(tmp_path / "first", max_steps=stop, **settings).fit(first, make(books, tmp_path))
    second = Recorder()
    again = trainer(tmp_path / "first", max_steps=stop + 10, **settings)
    again.fit(second, make(books, tmp_path), ckpt_path=str(tmp_path / "first" / f"step={stop}.ckpt"), weights_only=True)
    seen = first.seen + second.seen
    assert [decoded(batch) for batch in seen] == [decoded(batch) for batch in whole.seen]
    assert all(equal(one, other) for one, other in zip(seen, whole.seen, strict=True))
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_an_interrupted_run_saved_by_hand_repeats_the_batch_it_was_in(books: Path, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path / "whole", max_steps=12).fit(whole, make(books, tmp_path))
    first, path = Recorder(stop_before=5), tmp_path / "hand.ckpt"
    stopped = trainer(tmp_path / "first", max_steps=12)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit(first, make(books, tmp_path))
    stopped.save_checkpoint(path)
    second = Recorder()
    trainer(tmp_path / "first", max_steps=12).fit(second, make(books, tmp_path), ckpt_path=str(path), weights_only=True)
    assert [decoded(one) for one in first.seen + second.seen] == [decoded(one) for one in whole.seen]


def test_epochs_of_a_trainer_are_passes_over_the_documents(books: Path, tmp_path: Path) -> None:
    passes = [[decoded(batch) for batch in data] for data in [make(books, tmp_path).train_dataloader()] * 2]
    model = Recorder()
    trainer(tmp_path / "run", max_epochs=2).fit(model, make(books, tmp_path))
    assert [decoded(batch) for batch in model.seen] == passes[0] + passes[1]


def test_a_new_trainer_starts_over_without_a_checkpoint(books: Path, tmp_path: Path) -> None:
    data = make(books, tmp_path)
    runs = []
    for name in "ab":
        model = Recorder()
        trainer(tmp_path / name, max_steps=3).fit(model, data)
        runs.append([decoded(batch) for batch in model.seen])
    assert runs[0] == runs[1]


def test_resuming_with_other_settings_warns(books: Path, tmp_path: Path) -> None:
    state = make(books, tmp_path).state_dict()
    make(books, tmp_path).load_state_dict(state)
    with pytest.warns(UserWarning, match="other text than would have come"):
        make(books, tmp_path, seed=3).load_state_dict(state)


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    data = CrossbatchDataModule(
        tokenizer="tiny-random-llama", window=64, max_documents=6, max_document_tokens=2000, cache_dir=str(tmp_path)
    )
    data.report = lambda message: None
    data.setup("fit")
    assert data.train_batch(0)["input_ids"].shape == (4, 64)
    assert "the Python standard library" in said(data)
    assert len(data.heldout_documents(min_tokens=1500)) >= 1
