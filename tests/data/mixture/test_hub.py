"""Data sets of the library ``datasets``: local ones, so that nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_fot import CrossbatchDataModule
from lightning_fot.config.sources import HuggingFaceSettings
from lightning_fot.data.mixture.hub import HuggingFaceSource
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError
from tests.support.byte_tokenizer import ByteTokenizer

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def rows(tmp_path: Path, count: int = 60) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {number} " + "x" * number}) + "\n" for number in range(count)))
    return str(path)


def source(path: str, **given: Any) -> HuggingFaceSource:
    given = {"dataset": "json", "data_files": [path], "text_field": "body", "min_tokens": 10, **given}
    return HuggingFaceSource(
        HuggingFaceSettings(setting="data.sources[0]", **given), TextEncoder(ByteTokenizer()), 3, lambda _: None
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_shuffled_by_seed_split_and_left_out_when_short(tmp_path: Path, streaming: bool) -> None:
    one = source(rows(tmp_path), streaming=streaming, shuffle_buffer=7)

    def texts(number: int) -> list[str]:
        return [ByteTokenizer().decode(doc.read(0, len(doc))[0].tolist()) for doc in one.documents(number)]

    held = [document.text for document in one.heldout_documents(1)]
    assert texts(0) == texts(0) != texts(1)
    assert sorted(texts(0)) == sorted(texts(1))
    assert len(held) == 6 or len(held) == 5  # one of each ten; the first rows are too short
    assert not set(held) & set(texts(0))
    everything = [f"row {number} " + "x" * number for number in range(60)]
    assert sorted(held + texts(0)) == sorted(text for text in everything if len(text) >= 10)
    assert len(list(one.heldout())) == len(held)


def test_rows_are_cut_for_training_and_validation_and_read_whole_by_evaluation(tmp_path: Path) -> None:
    one = source(rows(tmp_path), max_document_tokens=12)
    assert max(len(document.ids) for document in one.heldout_documents(1)) > 40
    assert {len(document) for document in one.heldout()} <= {12, 13, 14}  # with the special tokens
    assert max(len(document) for document in one.documents(0)) <= 14


def test_a_mixture_of_rows_resumes_where_it_was(tmp_path: Path) -> None:
    def data() -> CrossbatchDataModule:
        module = CrossbatchDataModule(
            window=8, batch_size=4, pack=2, min_tokens=10, cache_dir=str(tmp_path / "cache"),
            sources=[
                {"kind": "huggingface", "dataset": "json", "data_files": rows(tmp_path), "text_field": "body"},
                {"kind": "dictionary", "tokens": 40},
            ],
        )  # fmt: skip
        module.tokenizer_object = ByteTokenizer()
        module.report = lambda message: None
        return module

    loader = iter(data().train_dataloader())
    made = [next(loader)["input_ids"].tolist() for _ in range(80)]
    again = data()
    assert [again.train_batch(step)["input_ids"].tolist() for step in (79, 3, 40)] == [made[79], made[3], made[40]]


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.text_field='text': is no column.*columns are body"):
        source(rows(tmp_path), text_field=None)
    with pytest.raises(SettingError, match=r"data\.sources\[0\]\.dataset='json': cannot be opened"):
        source(str(tmp_path / "absent.jsonl"))
