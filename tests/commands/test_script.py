from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from lightning_fot import _shim
from lightning_fot.commands import script


class _Other:
    """A ``lightning`` script of another distribution."""

    value = "other.cli:main"
    dist = SimpleNamespace(name="other-sdk")

    def load(self) -> object:
        return lambda: 7


class _Ours:
    value = "lightning_fot._shim:main"
    dist = SimpleNamespace(name="lightning_fot")

    def load(self) -> object:
        raise AssertionError("the shim must not find itself")


def _install(monkeypatch: pytest.MonkeyPatch, *scripts: object) -> None:
    def found(group: str, name: str) -> list[object]:
        assert (group, name) == ("console_scripts", "lightning")
        return list(scripts)

    monkeypatch.setattr(script, "entry_points", found)


def _call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["lightning", *words])
    monkeypatch.setattr("lightning_fot.cli.main", lambda arguments: 42)
    return _shim.main()


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["run", "--config", "x.yaml"], True),
        (["run", "--config=x.yaml"], True),
        (["run", "-c", "x.yaml"], True),
        (["fit", "--trainer.max_steps=3", "-c=x"], True),
        (["run", "job", "--name", "x"], False),
        (["run"], False),
        (["bench", "keys.npz"], True),
        (["ingest", "book", "book.txt"], True),
        (["ask", "book", "Who?"], True),
        (["lm-eval", "--tasks", "x"], True),
        (["retrievers"], True),
        (["doctor"], True),
        (["login"], False),
        (["--help"], False),
        ([], False),
        (["sweep", "--config", "x"], True),
        (["sweep", "agent"], False),
        (["report", "runs/hnsw"], True),
    ],
)
def test_claims_only_its_own(monkeypatch: pytest.MonkeyPatch, words: list[str], ours: bool) -> None:
    _install(monkeypatch, _Ours(), _Other())
    assert script.claims(words) is ours
    assert _call(monkeypatch, *words) == (42 if ours else 7)


def test_alone_it_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Ours())
    for words in ([], ["--help"], ["run"], ["login"]):
        assert _call(monkeypatch, *words) == 42


def test_opting_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(script.OPT_OUT, "1")
    _install(monkeypatch, _Ours(), _Other())
    assert _call(monkeypatch, "run", "--config", "x") == 7
    _install(monkeypatch, _Ours())
    assert _call(monkeypatch, "run", "--config", "x") == 2
    assert "lightning-fot" in capsys.readouterr().err
    monkeypatch.setenv(script.OPT_OUT, "0")
    assert _call(monkeypatch, "run", "--config", "x") == 42


def test_finds_itself_by_value_when_the_distribution_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, EntryPoint("lightning", "lightning_fot._shim:main", "console_scripts"))
    assert script.find_other() is None
