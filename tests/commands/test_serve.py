"""``lightning serve`` as a process: what it says, how it stops, and what it refuses before torch loads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from lightning_fot.cli import main
from tests.support.memories import SETTINGS, books
from tests.support.patience import PATIENCE_S


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two memories of different settings."""
    here = tmp_path_factory.mktemp("serve")
    books(here / "shelf", 1)
    before = Path.cwd()
    os.chdir(here)
    try:
        assert main(["ingest", "mine", "shelf", *SETTINGS]) == 0
        assert main(["ingest", "wider", "shelf", *SETTINGS, "--model.memory.window=48"]) == 0
    finally:
        os.chdir(before)
    return here


@pytest.fixture(autouse=True)
def _here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["MEMORY=None", "is missing"]),
        (["nine"], ["MEMORY='nine'", "There are: mine, wider"]),
        (["mine", "./memories/mine"], ["MEMORY='./memories/mine'", "as another one is"]),
        (["mine", "wider"], ["MEMORY='wider'", "model.memory.window=48", "model.memory.window=32", "another server"]),
        (["mine", "--host=0.0.0.0"], ["host='0.0.0.0'", "--api_key"]),
        (["mine", "--port=http"], ["port='http'", "whole number"]),
        (["mine", "--port=70000"], ["port=70000", "65535"]),
        (["mine", "--api_key=a", "--api_key_file=key"], ["api_key_file='key'", "Give one"]),
        (["mine", "--api_key_file=nowhere"], ["api_key_file='nowhere'", "No such file"]),
        (["mine", "--max_batch=0"], ["max_batch=0", "at least 1"]),
        (["mine", "--prot=1"], ["--prot", "Did you mean --port?"]),
    ],
)
def test_what_cannot_work_is_told(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said


def test_it_is_told_before_torch_loads() -> None:
    """Of all that is checked, what is checked last."""
    probe = (
        "import sys; from lightning_fot.cli import main; code = main(['serve', 'mine', 'wider']); "
        "assert 'torch' not in sys.modules and 'starlette' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2, done.stderr
    assert "another server" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_answers_and_stops_when_it_is_told(number: signal.Signals) -> None:
    Path("key").write_text("long-secret\n", encoding="utf-8")
    words = ["serve", "mine", "--port=0", "--api_key_file=key", f"--timeout={PATIENCE_S}", f"--grace={PATIENCE_S}"]
    command = [sys.executable, "-m", "lightning_fot", *words]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as process,
        ExitStack() as at_end,
    ):
        at_end.callback(process.kill)
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        ready = next(line for line in lines if line.startswith("Serving"))
        assert "with the API key" in ready
        assert "long-secret" not in ready
        found = re.search(r"http://127\.0\.0\.1:\d+", ready)
        assert found is not None
        client = at_end.enter_context(
            openai.OpenAI(base_url=f"{found[0]}/v1", api_key="long-secret", max_retries=0, timeout=PATIENCE_S)
        )
        assert [model.id for model in client.models.list()][:1] == ["mine"]
        stream = iter(client.completions.create(model="mine", prompt="word5", max_tokens=100, stream=True))
        events = [next(stream)]
        process.send_signal(number)
        events += list(stream)
        assert events[-1].choices[0].finish_reason is not None
        assert process.wait(PATIENCE_S) == 128 + number
        assert "Stopped." in list(lines)[-1]
