"""What a training that reads quotes is shown: passages of notes or of real text, and the questions that they answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from support.notes import Note, Question, Template
from torch import Tensor

from lightning_fot.data.mixture.facts import RealText, draw_facts
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.library.quotes import LENGTH
from lightning_fot.pretrained import load_tokenizer

BACKBONE = "smollm2-135m"
ASKED = "Question: {}\nAnswer:"  # the chat template of the weights
FACT_ROWS = 0.25  # so that look-ups stay what they are
TWO_DOCUMENTS = 0.5  # how often the second passage is of another document
PLAIN_TOKENS = 256
MOST_QUESTIONS = 5
NOTE_TOKENS = 160
QUOTED_ROWS = 0.6


@dataclass
class Row:
    """Ids of what is told, (ids, how many of them are the answer) of each question, and how these are asked.

    Args:
        told: Ids.
        asked: Questions.
        quoted: Whether questions see what is told in their window, too, and not in the memory alone.
    """

    told: list[int]
    asked: list[tuple[list[int], int]]
    quoted: bool = True


class Rows:
    """Rows by step: a function of the seed and its number."""

    def __init__(self, templates: list[Template], books: list[str], seed: int) -> None:
        self.templates = templates
        self.seed = seed
        self.tokenizer = load_tokenizer(BACKBONE)
        encoder = TextEncoder(self.tokenizer)
        self.books = RealText(books, encoder, "--books", 2000)
        self.code = RealText(None, encoder, "code", 2000)
        self.between = self.ids("\n")

    def ids(self, text: str) -> list[int]:
        """Ids of a text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def draw(self, step: int, count: int) -> tuple[list[Row], Tensor]:
        """Rows, and a window of plain text (1, ``PLAIN_TOKENS``) int64."""
        draw = random.Random(repr((self.seed, step)))
        rows = []
        for _ in range(count):
            quoted = draw.random() < QUOTED_ROWS
            if draw.random() < FACT_ROWS:
                rows.append(self._facts(draw, quoted))
            else:
                rows.append(self.note(self.templates, draw, quoted))
        text = self.books if step % 2 else self.code
        return rows, torch.tensor([text.stretch(PLAIN_TOKENS, draw)])

    def note(self, templates: list[Template], draw: random.Random, quoted: bool) -> Row:
        """A note of these templates, or two passages of notes that are quoted, and the questions that they answer."""
        while True:
            first = draw.choice(templates).fill(draw)
            if not quoted:
                ids, asked = self._passage(first, draw, NOTE_TOKENS)
                chosen = draw.sample(asked, min(MOST_QUESTIONS, len(asked)))
                return Row(ids, [self._question(question) for question in chosen], quoted)
            second = draw.choice(templates).fill(draw) if draw.random() < TWO_DOCUMENTS else first
            passages, asked = [], []
            for note in (first, second):
                ids, questions = self._passage(note, draw, LENGTH)
                passages.append(ids)
                asked += questions
            if asked:
                break
        if draw.random() < 0.5:
            passages.reverse()
        unique = {question.text: question for question in asked}
        chosen = draw.sample(list(unique.values()), min(MOST_QUESTIONS, len(unique)))
        return Row(
            [*self.between, *passages[0], *self.between, *passages[1], *self.between],
            [self._question(question) for question in chosen],
        )

    def _question(self, question: Question) -> tuple[list[int], int]:
        answer = self.ids(f" {question.answer}\n")
        return self.ids(ASKED.format(question.text)) + answer, len(answer)

    def _passage(self, note: Note, draw: random.Random, length: int) -> tuple[list[int], list[Question]]:
        """A passage around an answer, and the questions whose answers it holds."""
        encoded = self.tokenizer(note.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        wanted = draw.choice(note.questions)
        at = next(number for number, (_, end) in enumerate(places) if end > wanted.start)
        start = max(0, min(at - draw.randint(4, length - 8), len(ids) - length))
        low, high = places[start][0], places[min(start + length, len(ids)) - 1][1]
        # Some words on either side: an answer at the edge has nothing that says of what it is.
        margin = 12
        held = [
            question
            for question in note.questions
            if (low == 0 or question.start - margin >= low) and (high >= len(note.text) - 1 or question.end + 2 <= high)
        ]
        return ids[start : start + length], held

    def _facts(self, draw: random.Random, quoted: bool) -> Row:
        text = self.books if draw.random() < 0.7 else self.code
        facts = draw_facts(1, 4, draw.randint(1, 4), draw.getrandbits(48))[0]
        ids: list[int] = []
        asked = []
        for fact in facts:
            sentence = self.ids(f" {fact.told}{fact.value}{fact.after}")
            if len(sentence) > 40:
                continue
            before = draw.randint(0, LENGTH - len(sentence))
            passage = text.stretch(before, draw) + sentence
            passage += text.stretch(LENGTH - len(passage), draw) if len(passage) < LENGTH else []
            if len(ids) < 2 * LENGTH:
                ids += [*self.between, *passage]
                answer = self.ids(fact.value) + self.ids(fact.after)[:1]
                framed = self.ids(fact.value + "\n")
                for question in (fact.told, fact.asked):
                    asked.append((self.ids(question) + answer, len(answer)))
                    asked.append((self.ids(ASKED.format(question)) + framed, len(framed)))
        return (
            Row([*ids, *self.between], draw.sample(asked, min(MOST_QUESTIONS, len(asked))), quoted)
            if asked
            else self.note(self.templates, draw, quoted)
        )
