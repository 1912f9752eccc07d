"""Questions on code are those that its syntax tree answers."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SOURCE = """
class Ship:
    def __init__(self, name, length=3):
        self.name = name

    def sail(self, where, wind="north", sails=None, *,
             crew=4):
        return where

    def twice(self, a): ...


def twice(b, c): ...


def annotated(a: int, b: int = 2): ...


def late(x, y=[1]): ...
"""


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("code_questions")


def test_functions_defined_once_are_asked_of_in_words_of_their_source(questions: ModuleType) -> None:
    found = {(one.kind, one.told, one.answer) for one in questions.questions_of({"ship": SOURCE})}
    assert found == {
        ("where", "def sail(", ""),
        ("where", "def annotated(", ""),
        ("where", "def late(", ""),
        ("parameters", "def sail(", "self, where"),
        ("parameters", "def late(", "x, y"),
        ("default", "def sail(self, where, wind=", '"north"'),
        ("default", 'def sail(self, where, wind="north", sails=', "None"),
    }


def test_what_is_told_stands_in_the_source_and_the_answer_behind_it(questions: ModuleType) -> None:
    for question in questions.questions_of({"ship": SOURCE}):
        assert question.told + question.answer in SOURCE
        assert not question.answer or question.answer not in question.other
        assert f" {question.told.partition('(')[0].removeprefix('def ')}" in question.other
