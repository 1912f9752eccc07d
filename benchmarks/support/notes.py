"""Documents with questions, made from templates: ``benchmarks/reading/*.jsonl``, one a line.

``text`` has slots in braces, ``slots`` says what each is filled with: one of :data:`VALUES`, or one of its own list.
``questions`` are pairs of a question and its answer, which stands in the text word for word.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_fot.data.mixture import fact_templates as words

Value = Callable[[random.Random], str]
_SLOT = re.compile(r"\{(\w+)\}")


def _one_of(values: str, between: str | None = None) -> Value:
    listed = values.split(between)
    return lambda draw: draw.choice(listed)


def _count(unit: str, low: int, high: int) -> Value:
    return lambda draw: f"{draw.randint(low, high)} {unit}"


def _name(draw: random.Random) -> str:
    """Known or invented, so that names cannot be told by heart."""
    return draw.choice(words._LAST) if draw.random() < 0.5 else words._surname(draw)


def _big(draw: random.Random) -> str:
    return f"{draw.randint(1000, 99_999) if draw.random() < 0.8 else draw.randint(100_000, 9_999_999):,}"


_STREETS = "Street Road Lane Avenue Square Close Hill Way Terrace Row"
_FIRMS = "& Sons;Ltd;Brothers;GmbH;Works;Supplies;Transport;Electric;Foods;Partners;Instruments;Mills"
_BODIES = "Society;Association;Club;Foundation;Institute;Trust;Union;League;Council;Committee;Academy"
_TOPS = "org com net de co.uk io example"
VALUES: dict[str, Value] = {
    "first_name": lambda draw: draw.choice(words._FIRST),
    "last_name": _name,
    "full_name": lambda draw: f"{draw.choice(words._FIRST)} {_name(draw)}",
    "town": words._invented,
    "street": lambda draw: f"{_name(draw)} {draw.choice(_STREETS.split())}",
    "company": lambda draw: f"{_name(draw)} {draw.choice(_FIRMS.split(';'))}",
    "organisation": lambda draw: f"{words._invented(draw)} {draw.choice(_BODIES.split(';'))}",
    "date": lambda draw: f"{draw.randint(1, 28)} {draw.choice(words._MONTHS)}",
    "full_date": lambda draw: f"{draw.randint(1, 28)} {draw.choice(words._MONTHS)} {draw.randint(1850, 2029)}",
    "weekday": lambda draw: draw.choice(words._DAYS),
    "month": lambda draw: draw.choice(words._MONTHS),
    "year": lambda draw: str(draw.randint(1700, 2030)),
    "old_year": lambda draw: str(draw.randint(1200, 1899)),
    "time": lambda draw: f"{draw.randint(0, 23):02d}:{draw.randrange(0, 60, 5):02d}",
    "small": lambda draw: str(draw.randint(2, 12)),
    "number": lambda draw: str(draw.randint(13, 999)),
    "big": _big,
    "decimal": lambda draw: f"{draw.uniform(0.1, 20):.1f}",
    "price": lambda draw: f"£{draw.randint(2, 950)}" if draw.random() < 0.7 else f"£{draw.randint(1000, 95_000):,}",
    "euro": lambda draw: f"{draw.randint(3, 950)} euros" if draw.random() < 0.5 else f"{_big(draw)} euros",
    "percent": _count("%", 1, 99),
    "minutes": _count("minutes", 2, 90),
    "days": _count("days", 2, 60),
    "weeks": _count("weeks", 2, 40),
    "months": _count("months", 2, 30),
    "years": _count("years", 2, 60),
    "metres": _count("metres", 2, 900),
    "kilometres": _count("kilometres", 2, 900),
    "kilograms": _count("kilograms", 2, 900),
    "litres": _count("litres", 2, 400),
    "degrees": _count("°C", 3, 260),
    "phone": lambda draw: f"0{draw.randint(100, 999)} {draw.randint(100, 999)} {draw.randint(1000, 9999)}",
    "code": lambda draw: "".join(draw.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=2)) + f"-{draw.randint(100, 99_999)}",
    "pin": lambda draw: str(draw.randint(1000, 9999)),
    "email": lambda draw: f"{words._surname(draw).lower()}@{words._surname(draw).lower()}.{draw.choice(_TOPS.split())}",
    "ip": lambda draw: ".".join(str(draw.randint(1, 250)) for _ in range(4)),
    "version": lambda draw: f"{draw.randint(0, 12)}.{draw.randint(0, 30)}",
    "colour": lambda draw: draw.choice(words._COLOURS),
    "animal": lambda draw: draw.choice(
        [*words._ANIMALS, *["cat", "dog", "horse", "cow", "sheep", "hen", "goose", "pig"]]
    ),
    "food": lambda draw: draw.choice(words._FOODS),
    "drink": _one_of("cider;black tea;lemonade;coffee;apple juice;red wine;mint tea;cocoa;beer;buttermilk;mead", ";"),
    "fruit": _one_of("apples pears cherries plums figs quinces apricots raspberries grapes melons oranges currants"),
    "vegetable": _one_of("beans leeks carrots onions peas turnips cabbages pumpkins potatoes radishes spinach beets"),
    "instrument": lambda draw: draw.choice(words._INSTRUMENTS),
    "language": _one_of("Finnish Welsh Basque Turkish Polish Swahili Korean Greek Dutch Persian Latin Hungarian Urdu"),
    "country": _one_of("Norway Chile Kenya Portugal Japan Iceland Morocco Peru Estonia Vietnam Canada Georgia Oman"),
    "job": lambda draw: draw.choice(words._JOBS),
    "tree": _one_of("oak elm maple birch larch willow walnut chestnut poplar cedar rowan alder linden"),
    "flower": _one_of("tulips roses lilies asters dahlias peonies irises poppies marigolds lupins snowdrops"),
    "metal": _one_of("copper tin brass iron silver zinc nickel bronze lead titanium aluminium"),
    "room": lambda draw: draw.choice(words._SPOTS),
    "vehicle": _one_of("van;tractor;lorry;bus;motorcycle;ferry;bicycle;jeep;tram;hay cart;fire engine;minibus", ";"),
}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and where the answer stands in the text (characters)."""

    text: str
    answer: str
    start: int

    @property
    def end(self) -> int:
        """Behind the last character of the answer."""
        return self.start + len(self.answer)


@dataclass(frozen=True)
class Note:
    """A document with its questions."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Template:
    """What notes are made of."""

    text: str
    slots: dict[str, str | list[str]]
    questions: list[tuple[str, str]]

    def fill(self, draw: random.Random) -> Note:
        """A note with values that all differ."""
        values: dict[str, str] = {}
        for slot, kind in self.slots.items():
            for _ in range(50):
                value = VALUES[kind](draw) if isinstance(kind, str) else draw.choice(kind)
                if value not in values.values():
                    break
            values[slot] = value
        questions = []
        for text, answer in self.questions:
            places = [at.start() for at in re.finditer(re.escape(answer), self.text, re.IGNORECASE)]
            place = places[0] if len(places) == 1 else draw.choice(places)
            # As the text writes it.
            told = self.text[place : place + len(answer)]
            questions.append(
                Question(_filled(text, values), _filled(told, values), len(_filled(self.text[:place], values)))
            )
        return Note(_filled(self.text, values), tuple(questions))


def _filled(text: str, values: dict[str, str]) -> str:
    return _SLOT.sub(lambda slot: values[slot[1]], text)


def read_templates(folder: Path) -> list[Template]:
    """Templates of the files of a folder, in the order of their names."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            found.append(Template(said["text"], said["slots"], [tuple(pair) for pair in said["questions"]]))
    return found


def parted(templates: Sequence[Template], held_out: int) -> tuple[list[Template], list[Template]]:
    """Every ``held_out``-th template is kept from training."""
    kept = [one for number, one in enumerate(templates) if number % held_out == held_out - 1]
    return [one for number, one in enumerate(templates) if number % held_out != held_out - 1], kept
