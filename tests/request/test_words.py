"""The words of a command line: the same rules for every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fot.cli import VERBS, main
from lightning_fot.errors import SettingError
from lightning_fot.request.words import Option, Verb, assignments, read

# Each verb with words that are right so far, and an option of its own that takes a value: both are read, and no work
# is done, as every case adds a mistake.
TAKES_VALUE = {
    "run": (["--config=smoke"], "--model.memory.top_k"),
    "fit": (["--config=smoke"], "--trainer.max_steps"),
    "validate": (["--config=smoke"], "--ckpt_path"),
    "test": (["--config=smoke"], "--data.paths"),
    "sweep": (["--config=sweeps/index_types"], "--run_dir"),
    "report": (["runs/a"], "--out"),
    "bench": ([], "--k"),
    "ingest": (["mine", "a.txt"], "--config"),
    "ask": (["mine", "What?"], "--max_new_tokens"),
    "serve": (["mine"], "--port"),
    "lm-eval": (["--config=smoke"], "--tasks"),
}
WITHOUT = ("memories", "forget", "export", "retrievers", "doctor")
# Verbs that let any setting through to a later check, or words to another program.
OPEN = ("run", "fit", "validate", "test", "sweep", "lm-eval")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_every_verb_is_in_the_tables() -> None:
    assert {*TAKES_VALUE, *WITHOUT, "predict"} == set(VERBS)


@pytest.mark.parametrize("verb", TAKES_VALUE)
def test_a_missing_value_is_named(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, option = TAKES_VALUE[verb]
    name = option.removeprefix("--")
    for more in ([option], [option, "--model.dtype=float32"]):
        said = _refused([verb, *words, *more], capsys)
        assert f"error: {name}=None: has no value. Write {option}=" in said, more


@pytest.mark.parametrize("verb", [*TAKES_VALUE, *WITHOUT])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_wins_over_mistakes(verb: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, option = TAKES_VALUE.get(verb, ([], "--nothing"))
    assert main([verb, *words, option, word]) == 0
    assert "usage:" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("verb", [verb for verb in (*TAKES_VALUE, *WITHOUT) if verb not in OPEN])
@pytest.mark.parametrize("word", ["--nothing", "--nothing=3", "-x"])
def test_an_unknown_option_is_named(verb: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = TAKES_VALUE.get(verb, ([], ""))
    said = _refused([verb, *words, word], capsys)
    name, _, value = word.partition("=")
    assert f"error: {name}={value or None!r}: is not an option of {verb}. " in said
    assert f"{verb} --help" in said


@pytest.mark.parametrize("verb", ["run", "fit", "validate", "test", "sweep", "memories", "retrievers", "doctor",
                                  "export", "bench"])  # fmt: skip
@pytest.mark.parametrize("before", [[], ["--"]])
def test_a_word_too_many_is_named(verb: str, before: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = TAKES_VALUE.get(verb, ([], ""))
    plain = {"export": ["a", "b"], "bench": ["a"], "memories": ["a"]}.get(verb, [])
    assert "arguments='stray': is not understood" in _refused([verb, *words, *before, *plain, "stray"], capsys)


@pytest.mark.parametrize(("verb", "missing"), [("report", "RUN"), ("ingest", "PATH"), ("ask", "MEMORY"),
                                              ("serve", "MEMORY"),
                                              ("export", "OUT"), ("forget", "DOCUMENT")])  # fmt: skip
def test_a_missing_word_is_named(verb: str, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"ingest": ["mine"], "export": ["runs/a"], "forget": ["mine"]}.get(verb, [])
    said = _refused([verb, *words], capsys)
    assert f"{missing}=None: is missing. Write: " in said
    assert f"{verb} " in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sweep", "--config=sweeps/index_types", "--plan=yes"], "plan='yes': takes no value"),
        (["report", "a", "--json=x"], "json='x': takes no value"),
        (["ask", "mine", "What?", "--raw=1"], "raw='1': takes no value"),
        (["export", "a", "b", "--delta=1"], "delta='1': takes no value"),
        (["bench", "--dtype=int8"], "dtype='int8': is not known. Choose float16 or float32."),
        (["bench", "--target-recall=high"], "target-recall='high': must be a number"),
        (["bench", "--repeats", "3.5"], "repeats='3.5': must be a whole number"),
        (["run", "--config", "smoke", "--trainer.max-steps=3"], "trainer.max-steps='3': is not a known setting"),
        (["run", "--config"], "config=None: has no value. Write --config=NAME|FILE"),
        (["run", "--config="], "config='': has no value"),
    ],
)
def test_values_that_cannot_be(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in _refused(words, capsys)


VERB = Verb(
    "lightning x",
    (
        Option("count", kind=int, default=3, short="-n"),
        Option("name", many=True),
        Option("dry-run", kind=None, default=False),
    ),
    settings=("model.", "ckpt_path"),
    plain=("MEMORY", "[REST…]"),
)


@pytest.mark.parametrize(
    ("words", "count", "name", "settings", "plain"),
    [
        ("m", 3, [], [], ["m"]),
        ("m --count=4", 4, [], [], ["m"]),
        ("--count 4 m", 4, [], [], ["m"]),
        ("-n 4 m", 4, [], [], ["m"]),
        ("m -n=4", 4, [], [], ["m"]),
        ("m --count=1 --count=2", 2, [], [], ["m"]),
        ("m --count -2", -2, [], [], ["m"]),
        ("m --name a --name=b", 3, ["a", "b"], [], ["m"]),
        ("m --name=--count --count=4", 4, ["--count"], [], ["m"]),
        ("m --model.memory.top_k 8 --model.dtype=bfloat16", 3, [], ["--model.memory.top_k=8", "--model.dtype=bfloat16"],
         ["m"]),
        ("m --ckpt_path last", 3, [], ["--ckpt_path=last"], ["m"]),
        ("m --model.rope=", 3, [], ["--model.rope="], ["m"]),
        ("m --model.memory.memory_layers -1", 3, [], ["--model.memory.memory_layers=-1"], ["m"]),
        ("m --model.x=a=b", 3, [], ["--model.x=a=b"], ["m"]),
        ("m -", 3, [], [], ["m", "-"]),
        ("m -5 -.5", 3, [], [], ["m", "-5", "-.5"]),
        ("m -- --count 4 -h", 3, [], [], ["m", "--count", "4", "-h"]),
    ],
)  # fmt: skip
def test_the_same_words_in_several_forms(
    words: str, count: int, name: list[str], settings: list[str], plain: list[str]
) -> None:
    given = read(words.split(), VERB)
    assert (given.options.count, given.options.name, given.settings, given.plain) == (count, name, settings, plain)
    assert given.options.dry_run is False
    assert given.help is False


def test_a_switch_is_on_where_it_stands() -> None:
    assert read(["m", "--dry-run"], VERB).options.dry_run is True


@pytest.mark.parametrize("words", [["m", "--coun=4"], ["m", "--model=4"], ["m", "-x"]])
def test_names_are_not_abbreviated(words: list[str]) -> None:
    with pytest.raises(SettingError, match="is not an option of x"):
        read(words, VERB)


def test_words_of_another_program_keep_their_order() -> None:
    verb = Verb("lightning y", (Option("tasks", short="-t", passed=True),), settings=("model.",), others=True)
    given = read(["--limit", "2", "-t", "a,b", "--model.x", "1", "--tasks=c", "more", "--", "-h"], verb)
    assert given.options.tasks == "c"
    assert given.others == ["--limit", "2", "-t", "a,b", "--tasks=c", "more", "--", "-h"]
    assert list(assignments(given.settings)) == [("model.x", "1")]
    assert read(["--limit", "-h"], verb).help


def test_questions_to_jsonargparse_stand_alone() -> None:
    words = ["--print_config", "--trainer.logger.help", "CSVLogger", "--data.help", "--print_config=skip_null"]
    expected = ["--print_config", "--trainer.logger.help=CSVLogger", "--data.help", "--print_config=skip_null"]
    assert read(words, Verb("lightning run", settings=("",))).settings == expected


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_fot.commands import ask, export, report, serve
    from lightning_fot.commands.bench import bench

    verbs = {"ask": ask.VERB, "serve": serve.VERB, "bench": bench.VERB, "report": report.VERB, "export": export.VERB}
    for name, verb in verbs.items():
        assert main([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 100
        for option in verb.options:
            assert f"--{option.name}" in said
