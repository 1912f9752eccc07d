"""The page of model classes says what becomes of each decoder type: a handful here, all with ``robustness_long``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.support.backbone_survey import REFUSED, SERVED, WRONG, examine, examine_apart, page, read_page
from tests.support.decoder_types import decoder_types

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
PAGE = read_page(TEXT)
# Other versions of transformers know other types, and build the same ones otherwise.
of_this_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in TEXT, reason="the page is of another version of transformers"
)


@of_this_version
def test_every_type_stands_there_and_none_is_wrong() -> None:
    assert set(PAGE) == set(decoder_types())
    assert WRONG not in PAGE.values()
    assert {"llama", "qwen3", "gemma3_text", "gpt_oss", "lfm2"} <= {name for name in PAGE if PAGE[name] == SERVED}


def test_refusals_have_their_reasons() -> None:
    for title in ("Refused", "Not tried"):
        section = re.search(rf"^## {title} .*?(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
        rows = [line.split(" | ") for line in section[0].splitlines() if line.startswith("| `")] if section else []
        assert all(len(row) == 2 and len(row[1].split()) >= 2 for row in rows)


def test_a_page_is_read_as_it_was_written() -> None:
    common = {"transformers": "5.0", "class": "C", "states": False, "limits": [], "why": {}}
    findings = [
        {**common, "type": "one", "outcome": SERVED},
        {**common, "type": "two", "outcome": REFUSED, "why": "layer 3 of the backbone's 4 has no a|b"},
        {**common, "type": "six", "outcome": REFUSED, "why": "layer 1 of the backbone's 4 has no a|b"},
        {**common, "type": "odd", "outcome": WRONG, "why": {"backward": "AssertionError: differs"}},
    ]
    text = page(findings)
    assert read_page(text) == {"one": SERVED, "two": REFUSED, "six": REFUSED, "odd": WRONG}
    assert "| `six`, `two` | a layer of the backbone's layers has no a/b |" in text
    with pytest.raises(ValueError, match=r"Served: 1 are counted, 2 listed"):
        read_page(text.replace("`one`", "`one`, `more`"))


@of_this_version
@pytest.mark.parametrize("name", ["llama", "bloom", "diffllama", "bart"])
def test_a_type_is_as_the_page_says(name: str) -> None:
    assert examine(name)["outcome"] == PAGE[name]


@of_this_version
@pytest.mark.robustness_long
@pytest.mark.parametrize("name", decoder_types())
def test_each_type_is_as_the_page_says(name: str) -> None:
    found = examine_apart(name)
    assert found["outcome"] == PAGE[name], found["why"]
