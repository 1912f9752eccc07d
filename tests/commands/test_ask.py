"""``lightning ask``: answers against direct calls of the model, what is shown of them, and what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fot.cli import main
from lightning_fot.library.library import Library
from tests.support.memories import SETTINGS, backbone, books
from tests.support.patience import PATIENCE_S

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two memories of the same two documents; the tokenizer of ``chat`` has a template."""
    here = tmp_path_factory.mktemp("ask")
    books(here / "shelf", 2)
    backbone(here / "model", template=TEMPLATE)
    before = Path.cwd()
    os.chdir(here)
    try:
        assert main(["ingest", "mine", "shelf", *SETTINGS]) == 0
        assert main(["ingest", "chat", "shelf", *SETTINGS, "--model.backbone=model"]) == 0
    finally:
        os.chdir(before)
    return here


@pytest.fixture(autouse=True)
def _here(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)


class Terminal(io.StringIO):
    """Standard input of somebody who types."""

    def isatty(self) -> bool:
        return True


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["ask", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected(name: str, prompt: str, count: int, **options: Any) -> tuple[str, list[Any], Any]:
    """The continuation of a prompt by a direct call, the passages of it, and the tokenizer."""
    library = Library.read(Path("memories") / name)
    from lightning_fot.training.opening import open_model

    lm, tokenizer = open_model(library.model)
    memory = library.load(lm)
    ids = torch.tensor([[byte + 3 for byte in prompt.encode()]])
    options = {"do_sample": False, **options}
    with lm.record_attention() as trace:
        out = lm.generate(ids, memory, max_new_tokens=count, eos_token_id=1, pad_token_id=1, **options)
    passages = trace.passages(memory, length=20, top=3, queries="answer")
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), passages, tokenizer


@pytest.mark.slow
def test_the_greedy_answer_and_its_passages_are_those_of_a_direct_call(capsys: pytest.CaptureFixture[str]) -> None:
    text, passages, tokenizer = expected("mine", "What is word5?", 12)
    words = ["mine", "What is word5?", "--max_new_tokens=12", "--passages=3", "--passage_tokens=20"]
    found = answered(capsys, *words)
    assert (found["question"], found["text"], found["seed"]) == ("What is word5?", text, None)
    assert found["answer_tokens"] == 12
    assert found["complete"] is False
    assert found["prompt_tokens"] == len("What is word5?")
    assert "not what made it answer so" in found["note"]
    assert found["model"]["memory"]["top_k"] == 8
    assert len(passages) == len(found["passages"]) == 3
    for shown, passage in zip(found["passages"], passages, strict=True):
        assert (shown["document"], shown["start"], shown["stop"]) == (
            passage.document.name,
            passage.start,
            passage.stop,
        )
        assert shown["tokens"] == passage.document.tokens
        assert shown["share"] == pytest.approx(passage.mass)
        assert shown["rank_share"] == pytest.approx(passage.lift)
        assert shown["text"] == tokenizer.decode(passage.token_ids)
        # The tokenizer's ids are bytes: positions are places in the file.
        assert Path(shown["document"]).read_bytes()[shown["start"] : shown["stop"]].decode() == shown["text"]
    assert main(["ask", *words]) == 0
    said = capsys.readouterr()
    assert "where the model looked, not what made it answer so" in said.out
    for number, shown in enumerate(found["passages"], start=1):
        place = f"{number}. {shown['document']}, tokens {shown['start']:,} to {shown['stop']:,} of {shown['tokens']:,}"
        assert f"{place}: {shown['share']:.1%} of the attention to the memory" in said.out
        assert " ".join(shown["text"].split()) in said.out
    assert "Loading" in said.err
    assert main(["ask", "mine", "What", "--max_new_tokens=2", "--passages=0"]) == 0
    assert "assages" not in capsys.readouterr().out


def test_what_steers_a_terminal_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "mine", "Go on", "--max_new_tokens=60", "--temperature=5", "--seed=1"]) == 0
    said = capsys.readouterr().out
    assert all(sign.isprintable() or sign in "\n\t" for sign in said)


def test_the_chat_template_frames_the_question_unless_raw(capsys: pytest.CaptureFixture[str]) -> None:
    framed, raw = expected("chat", "[user] What?\n[assistant]", 8)[0], expected("chat", "What?", 8)[0]
    assert framed != raw
    assert answered(capsys, "chat", "What?", "--max_new_tokens=8")["text"] == framed
    assert answered(capsys, "chat", "What?", "--max_new_tokens=8", "--raw")["text"] == raw


@pytest.mark.slow
def test_sampling_is_asked_for_by_its_settings_and_seeded(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mine", "What?", "--max_new_tokens=12", "--temperature=1.5", "--top_p=0.9", "--top_k_tokens=50"]
    first = answered(capsys, *words, "--seed=3")
    state = torch.get_rng_state()
    again = answered(capsys, *words, "--seed=3")
    assert torch.equal(torch.get_rng_state(), state)
    assert first["text"] == again["text"]
    assert first["seed"] == 3
    assert answered(capsys, *words, "--seed=4")["text"] != first["text"]
    unseeded = answered(capsys, *words)
    assert answered(capsys, *words, f"--seed={unseeded['seed']}")["text"] == unseeded["text"]
    torch.manual_seed(3)
    direct = expected("mine", "What?", 12, do_sample=True, temperature=1.5, top_p=0.9, top_k=50)[0]
    assert direct == first["text"]
    # One likeliest token is the greedy answer.
    greedy = answered(capsys, "mine", "What?", "--max_new_tokens=12")
    assert answered(capsys, *words[:3], "--top_k_tokens=1")["text"] == greedy["text"]


@pytest.mark.slow
def test_settings_of_the_search_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    # An index would take longer to build than a question to answer.
    assert answered(capsys, "mine", "What?")["model"]["memory"]["retriever"] == "exact"
    found = answered(capsys, "mine", "What?", "--model.memory.top_k=3", "--model.memory.retriever", "hnsw")
    assert (found["model"]["memory"]["top_k"], found["model"]["memory"]["retriever"]) == (3, "hnsw")
    assert Library.read(Path("memories/mine")).model.memory["top_k"] == 8


def test_the_question_may_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = answered(capsys, "mine", "What is\nword5?", "--max_new_tokens=5")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\nword5?\n"))
    assert answered(capsys, "mine", "-", "--max_new_tokens=5")["text"] == direct["text"]


@pytest.mark.parametrize("name", ["chat", "mine"])
def test_a_conversation_goes_on_and_leaves_the_memory_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in Path("memories", name).iterdir()}
    if name == "chat":
        first = expected(name, "[user] One?\n[assistant]", 6)[0]
        second = expected(name, f"[user] One?\n[assistant] {first}\n[user] Two?\n[assistant]", 6)[0]
    else:
        first = expected(name, "One?", 6)[0]
        # The bytes of an answer need not be text: ids go on as they are.
        second = None
    monkeypatch.setattr(sys, "stdin", Terminal("One?\nTwo?\n\nNot asked.\n"))
    assert main(["ask", name, "--max_new_tokens=6", "--passages=1"]) == 0
    said = capsys.readouterr().out
    assert said.count("Passages that the answer attended to") == 2
    printed = "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in first)
    assert printed in said
    if second is not None and "\N{REPLACEMENT CHARACTER}" not in first:
        assert second in said
    assert {path.name: path.read_bytes() for path in Path("memories", name).iterdir()} == files
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert main(["ask", name]) == 0


_REFUSED: list[tuple[list[str], str]] = [
    (["nowhere", "What?"], "there is no folder memories/nowhere. There are: chat, mine."),
    (["shelf/", "What?"], "holds no library.json"),
    (["mine", " "], "question=' ': is empty"),
    (["mine"], "question=None: is missing"),
    (["mine", "-"], "is empty"),
    (["mine", "What?", "--tempratur=1"], "--tempratur='1': is not an option of ask. Did you mean --temperature?"),
    (["mine", "What?", "--max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
    (["mine", "What?", "--max_new_tokens=x"], "max_new_tokens='x': must be a whole number"),
    (["mine", "What?", "--temperature=0"], "temperature=0.0: must be at least 0.001"),
    (["mine", "What?", "--temperature=nan"], "temperature=nan"),
    (["mine", "What?", "--top_p=1.5"], "top_p=1.5"),
    (["mine", "What?", "--top_k_tokens=0"], "top_k_tokens=0"),
    (["mine", "What?", "--seed=-1"], "seed=-1"),
    (["mine", "What?", "--passages=-1"], "passages=-1"),
    (["mine", "What?", "--passage_tokens=0"], "passage_tokens=0"),
    (["mine", "What?", "--model.memory.top_k=0"], "model.memory.top_k=0"),
    (["mine", "What?", "--model.memory.top_l=4"], "Did you mean model.memory.top_k?"),
    (["mine", "What?", "--model.memory.positions=none"], "model.memory.positions='none': is fixed"),
    (["mine", "What?", "--model.backbone=other"], "model.backbone='other': is fixed"),
    (["mine", "What?", "--model.memory.retriever=hnws"], "hnws"),
    (["mine", "What?", "--model.memory.top_k"], "has no value"),
    (["mine", "What?", "--quotes=-1"], "quotes=-1: must be at least 0"),
    ([], "MEMORY=None: is missing"),
]


def test_mistakes_are_told_before_torch_is_loaded(repository: Path, shelf: Path) -> None:
    code = (
        "import json, sys\nfrom lightning_fot.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    print('#', main(['ask', *words]), 'torch' in sys.modules, file=sys.stderr, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([words for words, _ in _REFUSED])],
        cwd=shelf,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    said = done.stderr.split("# 2 False\n")
    assert len(said) == len(_REFUSED) + 1, done.stderr
    for (words, part), message in zip(_REFUSED, said, strict=False):
        assert part in message, words


def test_an_empty_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Library.read(Path("memories/mine"))
    empty = Library(Path("memories/empty"), mine.model)
    empty.write()
    try:
        assert main(["ask", "empty", "What?"]) == 2
        assert "MEMORY='memories/empty': is empty. Read documents:" in capsys.readouterr().err
    finally:
        (empty.path / "library.json").unlink()
        empty.path.rmdir()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--passage_tokens" in said
    assert "not what made it answer so" in said
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "  ingest " in said
    assert "  ask " in said


@pytest.mark.slow
def test_stopped_it_keeps_what_was_printed(repository: Path, shelf: Path) -> None:
    words = [sys.executable, "-m", "lightning_fot", "ask", "mine", "What?", "--max_new_tokens=100000"]
    process = subprocess.Popen(
        [*words, "--temperature=1", "--seed=1"],
        cwd=shelf,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # Words are written as they come: the answer is under way.
    first = b"".join(os.read(process.stdout.fileno(), 1) for _ in range(20))
    process.send_signal(signal.SIGINT)
    rest, said = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=PATIENCE_S) == 130
    assert first + rest
    assert b"Traceback" not in said
    assert said.decode().rstrip().endswith("Stopped.")
    process.stdout.close()
    process.stderr.close()
