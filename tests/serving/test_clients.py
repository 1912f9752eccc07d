"""The examples of LangChain and LlamaIndex get from a server what OpenAI's own client gets.

They run in this environment, or in that whose Python ``LIGHTNING_FOT_CLIENTS`` names: a client needs neither torch nor
this package, and may want other versions of its libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.markdown_blocks import ROOT
from tests.support.patience import PATIENCE_S
from tests.support.serving import Running

QUESTION = "word5 word7"


def output(server: Running, script: str, package: str) -> str:
    """What an example prints."""
    python = os.environ.get("LIGHTNING_FOT_CLIENTS", sys.executable)
    found = subprocess.run([python, "-c", f"import {package}"], capture_output=True, timeout=PATIENCE_S, check=False)
    if found.returncode:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [python, str(ROOT / "examples" / "clients" / script), server.address, "mine", QUESTION],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def answer(server: Running) -> tuple[str, list[str]]:
    """What OpenAI's client gets: the answer, and its documents."""
    done = server.client().chat.completions.create(
        model="mine", messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
    )
    assert done.choices[0].message.content
    return done.choices[0].message.content, [one["document"] for one in done.passages]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_langchain(server: Running) -> None:
    text, _ = answer(server)
    assert output(server, "langchain_chat.py", "langchain_openai") == f"{text}\n" * 3


@pytest.mark.slow
def test_llama_index(server: Running) -> None:
    text, documents = answer(server)
    said = output(server, "llama_index_llm.py", "llama_index.llms.openai_like")
    assert said.startswith(f"{text}\n" * 2)
    shown = said.removeprefix(f"{text}\n" * 2).splitlines()
    assert [line.rpartition(": ")[0] for line in shown] == documents
    assert documents
