"""Tasks made of text: what their generators promise, and that their scores are those of a plain forward."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_fot import EvaluationConfig, attach_memory
from lightning_fot.config.tasks import TASKS, CommonWordsTask, KeyValueTask, ManyShotTask, NeedlesTask, StoryTask
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.plan import SO_FAR, plan
from lightning_fot.evaluation.tasks.common_words import CommonWords
from lightning_fot.evaluation.tasks.key_value import FACTS, KeyValue
from lightning_fot.evaluation.tasks.many_shot import ManyShot
from lightning_fot.evaluation.tasks.names import far_names
from lightning_fot.evaluation.tasks.needles import Needles
from lightning_fot.evaluation.tasks.parts.episode import Episode, Probe
from lightning_fot.evaluation.tasks.runner import ask
from lightning_fot.pretrained import load_backbone
from lightning_fot.report.content.task_tables import found
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fast_tokenizer import byte_level
from tests.support.models import settings

NOTHING_ELSE: dict[str, Any] = {"context_tokens": [], "passkey_tokens": []}
TOKENIZERS = [ByteTokenizer(), ByteTokenizer(prefix=True), byte_level()]


@pytest.fixture(scope="module")
def lm():
    with attach_memory(load_backbone("tiny-random-llama"), settings(window=64)) as lm:
        yield lm


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    lines = [f"{'ABC'[n % 3]}:sub{n % 2} question number {n} ?" for n in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def text(tokenizer: Any, ids: np.ndarray) -> str:
    start = 1 if len(ids) and ids[0] == tokenizer.bos_token_id else 0
    return str(tokenizer.decode(ids[start:].tolist()))


def asked(tokenizer: Any, probe: Probe) -> tuple[str, str]:
    """Question and answer of a probe."""
    ((start, stop),) = probe.answers
    assert stop == len(probe.ids)
    return text(tokenizer, probe.ids[:start]), str(tokenizer.decode(probe.ids[start:].tolist()))


def same(one: list[Episode], other: list[Episode]) -> bool:
    return all(
        np.array_equal(a.context, b.context)
        and [probe.ids.tolist() for probe in a.probes] == [probe.ids.tolist() for probe in b.probes]
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("keys", [1, 4])
def test_needles_stand_at_their_depths_and_each_answer_is_told_once(tokenizer: Any, keys: int) -> None:
    task = NeedlesTask(tokens=[1500, 3000], keys=keys, asked=3, samples=3)
    for length in task.tokens:
        episodes = Needles(task, tokenizer).episodes(length)
        assert len({text(tokenizer, episode.context) for episode in episodes}) == 3
        for episode in episodes:
            assert len(episode.context) == length
            whole = text(tokenizer, episode.context)
            told = re.findall(r"The pass key of the (\w+ \w+) is (\d+)\.", whole)
            assert len(told) == len(dict(told)) == len({number for _, number in told}) == keys
            for place, match in enumerate(re.finditer(r" The pass key of the", whole)):
                # Depth in tokens, not in letters.
                depth = len(tokenizer(whole[: match.start()], add_special_tokens=False)["input_ids"]) / length
                assert depth == pytest.approx((place + 0.5) / keys, abs=0.12 if keys == 4 else 0.05)
            assert len(episode.probes) == min(3, keys)
            for probe in episode.probes:
                question, answer = asked(tokenizer, probe)
                name = re.fullmatch(r" What is the pass key of the (.*)\? The pass key of the \1 is", question)[1]
                assert answer == f" {dict(told)[name]}"
        assert same(episodes, Needles(task, tokenizer).episodes(length))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_documents_grow_and_one_of_them_alone_has_the_answer(tokenizer: Any) -> None:
    task = KeyValueTask(tokens=[9000, 3000], questions=5)
    make = KeyValue(task, tokenizer)
    small, large = make.episodes(3000)[0], make.episodes(9000)[0]
    assert len(small.context) <= 3000
    assert np.array_equal(large.context[: len(small.context)], small.context)
    documents = text(tokenizer, small.context).split("\n\n")[1:]
    names = [re.match(r"Document \d+, about (.*?)\.", document)[1] for document in documents]
    assert len(set(names)) == len(names)
    for probe, again in zip(small.probes, large.probes, strict=True):
        assert probe.ids.tolist() == again.ids.tolist()
        question, answer = asked(tokenizer, probe)
        key, name = re.search(r"What is the (.*) of (.*)\?", question).groups()
        holding = [document for document in documents if f"The {key} of {name} is{answer}" in document]
        assert len(holding) == 1
        assert sum(f"The {key} of {name} is" in document for document in documents) == 1
        assert [str(tokenizer.decode(list(one))) for one in probe.choices] == [f" {value}." for value in FACTS[key]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_one_word_is_the_most_common_by_the_factor_that_is_set(tokenizer: Any) -> None:
    task = CommonWordsTask(tokens=[1000, 2000], words=5, often=3, samples=4)
    for length in task.tokens:
        answers = set()
        for episode in CommonWords(task, tokenizer).episodes(length):
            assert 0.9 * length < len(episode.context) <= length
            listed = Counter(text(tokenizer, episode.context).partition("List: ")[2].split())
            (first, most), *others = listed.most_common()
            assert {3 * count for _, count in others} == {most}
            answers.add(first)
            assert asked(tokenizer, episode.probes[0])[1] == f" {first}."
            choices = {str(tokenizer.decode(list(one))) for one in episode.probes[0].choices}
            assert choices == {f" {word}." for word in listed}
        assert len(answers) > 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("fine", [False, True])
def test_what_is_asked_for_was_never_shown(tokenizer: Any, labels: Path, fine: bool) -> None:
    lines = dict(line.split(" ", 1)[::-1] for line in labels.read_text().splitlines())
    task = ManyShotTask(tokens=[400, 800, 100_000], path=str(labels), questions=6, local=2, fine=fine)
    make = ManyShot(task, tokenizer, 256)
    shown: list[list[str]] = []
    for length in task.tokens:
        (episode,) = make.episodes(length)
        assert len(episode.context) <= length
        blocks = text(tokenizer, episode.context).split("\n\n")
        assert blocks.pop() == ""
        shown.append(blocks)
        for probe in episode.probes:
            question, answer = asked(tokenizer, probe)
            *near, last = question.split("\n\n")
            assert len(near) == 2
            examples = [*blocks, *near, last + answer.rstrip("\n")]
            texts = [re.fullmatch(r"Text: (.*)\nLabel: (.*)", one).groups() for one in examples]
            assert len({content for content, _ in texts}) == len(texts)
            for content, label in texts:
                wanted = lines[content] if fine else lines[content].partition(":")[0]
                assert label == wanted
            assert len(probe.choices) == (6 if fine else 3)
    assert shown[0] == shown[1][: len(shown[0])]
    # As many as the file has: 60 but for 6 questions and 2 in the local window.
    assert len(shown[0]) < len(shown[1]) < len(shown[2]) == 52
    # Local examples give way where the window is short.
    (short,) = ManyShot(task, tokenizer, 60).episodes(400)
    assert all(len(probe.ids) <= 60 or "\n\n" not in asked(tokenizer, probe)[0] for probe in short.probes)


@pytest.mark.slow
@torch.no_grad()
def test_a_choice_is_what_decoding_among_the_choices_gives(lm) -> None:
    draw = torch.Generator().manual_seed(3)
    memory = lm.ingest(torch.randint(3, 200, (1, 100), generator=draw), lm.new_memory())
    choices = ((5, 6, 9), (5, 7, 9), (8, 9), (11, 6, 6, 9), (12, 9))
    hits = 0
    for trial in range(12):
        prompt = torch.randint(3, 200, (1, 10), generator=torch.Generator().manual_seed(trial))
        # Step by step: the most likely token of those that some choice goes on with.
        given: list[int] = []
        while tuple(given) not in choices:
            allowed = sorted({one[len(given)] for one in choices if list(one[: len(given)]) == given})
            ids = torch.cat([prompt, torch.tensor([given], dtype=torch.int64)], dim=1)
            logits = lm(ids, memory=memory).logits[0, -1]
            given.append(max(allowed, key=lambda token: float(logits[token])))
        for choice in choices:
            ids = np.array([*prompt[0].tolist(), *choice], np.int32)
            (answer,) = ask(lm, Probe(ids, ((10, len(ids)),), choices), memory)
            assert answer.correct == (choice == tuple(given))
            hits += answer.correct
    assert hits == 12


def _tasks(labels: Path) -> dict[str, Any]:
    return {
        "needles": {"tokens": [600], "keys": 2, "samples": 2},
        "key_value": {"tokens": [1200, 2400], "questions": 3},
        "common_words": {"tokens": [600], "samples": 2},
        "many_shot": {"tokens": [300], "path": str(labels), "questions": 4, "local": 1},
        "story": {"tokens": [128, 64], "target_tokens": 100, "stories": 2},
    }


def _stories() -> list[SimpleNamespace]:
    draw = np.random.default_rng(0)
    return [SimpleNamespace(name=f"s{n}", ids=draw.integers(3, 250, 300)) for n in range(2)]


@pytest.mark.slow
@torch.no_grad()
def test_rows_are_those_of_reading_each_question_alone(lm, labels: Path) -> None:
    tokenizer = ByteTokenizer()
    config = EvaluationConfig(**NOTHING_ELSE, **_tasks(labels))
    records: dict[str, Any] = {}
    results = evaluate(lm, tokenizer, [], config, texts={"story": _stories()}, on_result=records.__setitem__)
    finished = [name for name in records if not name.endswith(SO_FAR)]
    assert finished == [name for name, _ in plan(config, "exact", 64)]
    # Documents that the smaller memory holds are not read again, but for the end that filled no window.
    assert records["key_value: exact, 1200 tokens"][0]["read_tokens"] > 1100
    assert records["key_value: exact, 2400 tokens"][0]["read_tokens"] < 1300 + 64
    rows = {(row["task"], row["context_tokens"], row["memory"]): row for row in results["tasks"]}
    assert len(rows) == 2 * (1 + 2 + 1 + 1)
    makers = {
        "needles": Needles(config.needles, tokenizer),
        "key_value": KeyValue(config.key_value, tokenizer),
        "common_words": CommonWords(config.common_words, tokenizer),
        "many_shot": ManyShot(config.many_shot, tokenizer, 64),
    }
    for (task, length, memory), row in rows.items():
        nats, count = [], 0
        for episode in makers[task].episodes(length):
            for probe in episode.probes:
                ((start, stop),) = probe.answers
                ids = torch.from_numpy(probe.ids).long()[None]
                held = lm.new_memory()
                if memory == "exact":
                    lm.ingest(torch.from_numpy(episode.context).long()[None], held)
                logits = lm(ids, memory=held).logits[0, start - 1 : stop - 1]
                nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, start:stop])))
                count += 1
        assert row["n"] == count
        assert row["nll"] == pytest.approx(np.mean(nats), abs=1e-4), (task, length, memory)
    assert rows["needles", 600, "exact"]["texts"] == 2
    shown = {table.title.split(" accuracy")[0] for table in found(results)}
    assert {
        "Needles",
        "Key value",
        "Common words",
        "Many shot",
        "A story's continuation by distance from its context",
    } <= shown


@torch.no_grad()
def test_a_storys_windows_are_scored_beside_its_context_alone(lm, labels: Path) -> None:
    config = EvaluationConfig(**NOTHING_ELSE, story=StoryTask(tokens=[128, 64], target_tokens=100, stories=2))
    rows = evaluate(lm, ByteTokenizer(), [], config, texts={"story": _stories()})["story"]
    assert not any("names" in row for row in rows)  # random bytes have none
    assert [(row["memory"], row["context_tokens"], row["distance"], row["tokens"]) for row in rows] == [
        (memory, length, distance, tokens)
        for memory in ("none", "exact")
        for length in (64, 128)
        for distance, tokens in ((0, 128), (64, 72))
    ]
    for row in rows:
        losses, base = [], []
        for story in _stories():
            ids = torch.from_numpy(story.ids).long()[None]
            memory = lm.ingest(ids[:, 128 - row["context_tokens"] : 128], lm.new_memory())
            start = 128 + row["distance"]
            stop = min(start + 64, 228)
            for held, kept in ((memory, losses), (None, base)):
                logits = lm(ids[:, start:stop], memory=held).logits[0]
                kept.append(float(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1])))
        if row["memory"] == "none":
            assert row["nll"] == pytest.approx(np.mean(base), abs=1e-5)
            assert "gain_nats" not in row
        else:
            assert row["nll"] == pytest.approx(np.mean(losses), abs=1e-5)
            gains = np.subtract(base, losses)
            assert row["gain_nats"] == pytest.approx(gains.mean(), abs=1e-5)
            assert row["gain_standard_error"] == pytest.approx(gains.std(ddof=1) / 2**0.5, abs=1e-5)


def test_what_cannot_work_is_named(lm, labels: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("A some text\nB\n", encoding="utf-8")
    for given, message in (
        ({"many_shot": {}}, r"evaluation\.many_shot\.path='': is no file"),
        ({"needles": {"keys": 101}}, r"needles\.keys=101: are told apart by 100 names"),
        ({"common_words": {"words": 21}}, r"common_words\.words=21: there are 20"),
        ({"story": {"stories": 0}}, r"story\.stories=0: must be a whole number"),
        ({"needles": {"tokens": [200]}}, r"needles\.tokens=\[200\]: 4 keys take \d+ tokens without any filler"),
        ({"key_value": {"tokens": [400]}}, r"key_value\.questions=32: the smallest memory of 400 tokens holds \d doc"),
        ({"common_words": {"tokens": [99]}}, r"common_words\.tokens=\[99\]: 99 is too short for the words once"),
        ({"many_shot": {"path": str(labels)}}, r"many_shot\.path='.*': has 60 examples and 69 are needed"),
        ({"many_shot": {"path": str(wrong)}}, r"many_shot\.path='.*': line 2 has a label and no text"),
        ({"story": {}}, r"story\.tokens=\[8192\]: takes 2 held-out documents of 10241 tokens, and there are 0"),
    ):
        with pytest.raises(SettingError, match=message):
            evaluate(lm, ByteTokenizer(), [], EvaluationConfig(**NOTHING_ELSE, **given))


def test_the_settings_of_the_page_are_settings(repository: Path, labels: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (repository / "docs" / "tasks.md").read_text(encoding="utf-8"), re.S)
    given = yaml.safe_load(block.replace("labels.txt", str(labels)))["evaluation"]
    config = EvaluationConfig(**given)
    assert [task.name for task in config.tasks] == [kind.name for kind in TASKS]


STORY = "When the Baroness left, only Otto and Emil stayed. They spoke little. " * 3
NEXT = "In spring they wrote to Emil again, and then to Emil, but Hugo and, later, Otto wrote. Otto knew Baroness Ute."


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_names_are_those_of_the_context_that_the_window_does_not_have(tokenizer: Any) -> None:
    def ids(written: str) -> list[int]:
        return tokenizer(written, add_special_tokens=False)["input_ids"]

    target = ids(NEXT)

    def names(window: int) -> list[str]:
        return [tokenizer.decode(target[a:b]).strip() for a, b in far_names(tokenizer, ids(STORY), target, window)]

    # Emil comes twice, Hugo is new, and the second Otto begins a sentence.
    assert names(10_000) == ["Emil", "Otto", "Baroness"]
    # A window that begins between them has not seen the first.
    again = len(ids(NEXT[: NEXT.index("and then")]))
    assert names(again)[:2] == ["Emil", "Emil"]


@torch.no_grad()
def test_the_loss_of_names_is_that_of_their_tokens(lm) -> None:
    ids = np.array(ByteTokenizer()(STORY + NEXT + " " * 60, add_special_tokens=False)["input_ids"], np.int32)
    task = StoryTask(tokens=[len(STORY)], target_tokens=len(NEXT), stories=1)
    config = EvaluationConfig(**NOTHING_ELSE, story=task)
    text = SimpleNamespace(name="s", ids=ids)
    rows = [
        row for row in evaluate(lm, ByteTokenizer(), [], config, texts={"story": [text]})["story"] if "names" in row
    ]
    assert [(row["memory"], row["context_tokens"]) for row in rows] == [("none", len(STORY)), ("exact", len(STORY))]
    memory = lm.ingest(torch.from_numpy(ids[: len(STORY)]).long()[None], lm.new_memory())
    target = torch.from_numpy(ids[len(STORY) :]).long()[None]
    for row, held in zip(rows, (None, memory), strict=True):
        parts = [lm(target[:, at : at + 64], memory=held).logits[0] for at in range(0, len(NEXT), 64)]
        losses = torch.nn.functional.cross_entropy(
            torch.cat(parts)[:-1], target[0, 1 : len(torch.cat(parts))], reduction="none"
        )
        places = far_names(ByteTokenizer(), ids[: len(STORY)].tolist(), target[0, : len(NEXT) + 1].tolist(), 64)
        assert row["names"] == len(places) >= 3
        assert row["nll"] == pytest.approx(np.mean([float(losses[a - 1 : b - 1].sum()) for a, b in places]), abs=1e-4)
    assert rows[1]["gain_nats"] == pytest.approx(rows[0]["nll"] - rows[1]["nll"], abs=1e-6)
    (table,) = [one for one in found({"story": [*rows, {**rows[0], "distance": 0}]}) if "story" in one.title]
    assert [row[0].text for row in table.rows] == ["0", "names"]
    assert table.columns == ("from", "none", f"exact, {len(STORY)}")
