"""Questions on one of many documents: facts about people, of which no other document says the same thing."""

from __future__ import annotations

import random
from typing import Any

from lightning_fot.config.tasks import KeyValueTask
from lightning_fot.evaluation.tasks.parts.episode import Episode
from lightning_fot.evaluation.tasks.parts.text import Pieces, as_ids

_ONSETS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z", "Br", "Cl", "Dr", "St")
_RHYMES = ("a", "e", "i", "o", "u", "an", "el", "in", "or", "us")
_ENDS = ("bert", "dan", "ford", "lan", "man", "mond", "ner", "sen", "ton", "vik")
FACTS = {
    "city": ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Dublin", "Athens", "Moscow", "Tokyo"),
    "profession": (
        "teacher",
        "doctor",
        "farmer",
        "lawyer",
        "painter",
        "soldier",
        "baker",
        "sailor",
        "writer",
        "singer",
    ),
    "favourite animal": ("dog", "cat", "horse", "bird", "fish", "bear", "lion", "rabbit", "mouse", "sheep"),
    "favourite colour": ("red", "blue", "green", "white", "black", "brown", "yellow", "purple", "orange", "grey"),
}
_TASK = "Each of these documents is about one person. I will ask about one of them."
_QUESTION = "\nQuestion: What is the {key} of {name}?\nAnswer: The {key} of {name} is"


class KeyValue:
    """Document i is the same in a memory of any size; those of the smallest memory are asked for.

    Args:
        settings: What is asked.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        SettingError: The smallest memory holds fewer documents than questions.
    """

    def __init__(self, settings: KeyValueTask, tokenizer: Any) -> None:
        self._pieces = Pieces(tokenizer)
        self._settings = settings
        self._documents: list[tuple[int, ...]] = []
        self._people: list[tuple[str, dict[str, str]]] = []
        self._names = [f"{a}{b}{c}" for a in _ONSETS for b in _RHYMES for c in _ENDS]
        random.Random(f"{settings.seed}/names").shuffle(self._names)
        held = self._fill(settings.lengths[0])[1]
        if held < settings.questions:
            problem = f"the smallest memory of {settings.lengths[0]} tokens holds {held} documents"
            raise settings.error("questions", problem, "Ask fewer, or raise the smallest of tokens.")
        draw = random.Random(f"{settings.seed}/questions")
        probes = []
        for number in sorted(draw.sample(range(held), settings.questions)):
            name, facts = self._people[number]
            key = draw.choice(sorted(facts))
            choices = [f" {value}." for value in FACTS[key]]
            probes.append(self._pieces.question(_QUESTION.format(key=key, name=name), f" {facts[key]}.", choices))
        self._probes = tuple(probes)

    def episodes(self, length: int) -> list[Episode]:
        """One: as many whole documents as ``length`` tokens hold, and the questions."""
        return [Episode(as_ids(self._fill(length)[0]), self._probes)]

    def _fill(self, length: int) -> tuple[list[int], int]:
        """Ids, and how many documents they are."""
        ids = [*self._pieces.start, *self._pieces.encode(_TASK, "")]
        number = 0
        while True:
            document = self._document(number)
            if len(ids) + len(document) > length:
                return ids, number
            ids.extend(document)
            number += 1

    def _document(self, number: int) -> tuple[int, ...]:
        while len(self._documents) <= number:
            new = len(self._documents)
            draw = random.Random(f"{self._settings.seed}/{new}")
            again, place = divmod(new, len(self._names))
            # Beyond two thousand names a number tells people apart.
            name = self._names[place] + (f" {again + 1}" if again else "")
            facts = {key: draw.choice(values) for key, values in FACTS.items()}
            listed = list(facts.items())
            draw.shuffle(listed)
            text = f"\n\nDocument {new + 1}, about {name}." + "".join(
                f" The {key} of {name} is {value}." for key, value in listed
            )
            self._people.append((name, facts))
            self._documents.append(self._pieces.encode(text))
        return self._documents[number]
