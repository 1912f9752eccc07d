"""Facts that differ in their names alone, and real text in which each is told once.

Names, sentences and values are not those of the training source ``facts``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words("Paris Rome Oslo Lima Cairo Delhi Quito Minsk Perth Bergen Turin Lyon Izmir Kyoto Accra Leeds")
PEOPLE = _words("Morwenna Tobias Ingrid Casimir Philippa Anselm Beatrix Leopold Rosalind Gideon Ottoline Barnaby")
ISLANDS = _words("Skarva Tolmin Brenn Osmore Lundey Cavra Ferrow Halsa Norrick Quill Vardo Amble")
VILLAGES = _words("Hartwell Dunmere Ashby Colwick Penrose Thornby Elmstead Wexcombe Rushford Marlow Kelby Stanway")
PLACES = (
    "blue teapot",
    "church tower",
    "old barn",
    "piano stool",
    "wine cellar",
    "garden shed",
    "linen chest",
    "grandfather clock",
    "flour bin",
    "rabbit hutch",
    "boat house",
    "coal scuttle",
)
SURNAMES = _words(
    "Pettigrew Lindqvist Okafor Marchetti Dubrovsky Hanley Castellano Whitlock Novak Ferreira Abbott Singh"
)
# A stretch without a sentence's end, as in tables or source code, is cut after so many letters.
_LONGEST = 2000


@dataclass(frozen=True)
class Fact:
    """One fact: how it is told, the two ways in which it is asked, and what must follow both."""

    group: str
    told: str
    other: str
    answer: str
    end: str = "."

    @property
    def statement(self) -> str:
        """The sentence that stands in the text; asking in told words gives its beginning again."""
        return f"{self.told}{self.answer}{self.end}"


def make_facts(count: int, seed: int) -> list[Fact]:
    """Facts of four groups in turn; within a group they differ in their names.

    Args:
        count: How many, at most 48 (:data:`lightning_fot.config.tasks.MOST_FACTS`).
        seed: Of names and values.
    """
    draw = random.Random(seed)

    def names(pool: Sequence[str]) -> list[str]:
        return draw.sample(pool, len(pool))

    groups = [
        [
            Fact(
                "code",
                f"The secret code of {name} is",
                f"Question: Which number unlocks the door in {name}?\nAnswer:",
                f" {draw.randint(10_000, 99_999)}",
            )
            for name in names(CITIES)
        ],
        [
            Fact(
                "key",
                f"{name} hides the silver key in the",
                f"Question: Where does {name} keep the silver key?\nAnswer: In the",
                f" {place}",
            )
            for name, place in zip(names(PEOPLE), names(PLACES), strict=True)
        ],
        [
            Fact(
                "ferry",
                f"The ferry to {name} leaves at",
                f"Question: When does the boat for {name} depart?\nAnswer: At",
                f" {draw.randint(1, 12)}:{draw.randint(10, 59)}",
            )
            for name in names(ISLANDS)
        ],
        [
            Fact(
                "baker",
                f"In the village of {name}, the baker is called",
                f"Question: Who bakes the bread in {name}?\nAnswer:",
                f" {surname}",
            )
            for name, surname in zip(names(VILLAGES), names(SURNAMES), strict=True)
        ],
    ]
    return [group[number] for number in range(max(map(len, groups))) for group in groups if number < len(group)][:count]


def sentences_of(text: str) -> list[str]:
    """A text as one line, cut behind the ends of its sentences."""
    sentences = re.split(r"(?<=[.!?]) +", re.sub(r"\s+", " ", text).strip())
    return [piece for sentence in sentences for piece in _cut(sentence) if piece]


def _cut(sentence: str) -> list[str]:
    """Pieces of at most ``_LONGEST`` letters, cut at blanks."""
    pieces = []
    while len(sentence) > _LONGEST:
        place = sentence.rfind(" ", 1, _LONGEST)
        place = _LONGEST if place < 0 else place
        pieces.append(sentence[:place])
        sentence = sentence[place:].strip()
    return [*pieces, sentence]


def text_with(
    facts: Sequence[Fact], sentences: Sequence[str], size: Callable[[str], int], tokens: int, seed: int
) -> tuple[str, int]:
    """Sentences with one fact after each stretch of equal length, in a drawn order.

    Args:
        facts: What is told, each once.
        sentences: The text; the first ones are taken.
        size: Tokens of a sentence with the blank before it.
        tokens: Of the whole; it has these or a little less.
        seed: Of the order of the facts.

    Returns:
        The text, and how many sentences stand in it: all of ``sentences`` where there are too few.
    """
    order = random.Random(seed).sample(list(facts), len(facts))
    room = tokens - sum(size(f" {fact.statement}") for fact in facts)
    pieces: list[str] = []
    used = told = taken = 0
    for sentence in sentences:
        more = size(f" {sentence}")
        if used + more > room:
            break
        pieces.append(sentence)
        used += more
        taken += 1
        while told < len(order) and used >= (told + 0.5) * room / len(order):
            pieces.append(order[told].statement)
            told += 1
    pieces += [fact.statement for fact in order[told:]]
    return " ".join(pieces), taken
