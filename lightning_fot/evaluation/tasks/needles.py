"""Several pass keys in one text, told apart by name (RULER's multi-key and multi-query tasks, arXiv 2404.06654)."""

from __future__ import annotations

import itertools
import random

from lightning_fot.config.tasks import NeedlesTask
from lightning_fot.data.mixture.passkey import FILLER
from lightning_fot.evaluation.tasks.parts.episode import Episode
from lightning_fot.evaluation.tasks.parts.samples import Samples
from lightning_fot.evaluation.tasks.parts.text import as_ids

_TASK = "Several pass keys are hidden inside a lot of irrelevant text. Memorize them. I will quiz you about them."
_NEEDLE = " The pass key of the {name} is {number}."
_QUESTION = " What is the pass key of the {name}? The pass key of the {name} is"
_COLOURS = ("red", "blue", "green", "white", "black", "brown", "golden", "silver", "purple", "orange")
_ANIMALS = ("fox", "owl", "bear", "horse", "swan", "wolf", "cat", "dog", "mouse", "eagle", "snake", "sheep")
NAMES = tuple(f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS)


class Needles(Samples[NeedlesTask]):
    """Prompts with ``keys`` numbers at even depths, a few of which are asked for.

    Args:
        settings: What they are like.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        SettingError: A length has no room for the keys.
    """

    def _episode(self, length: int, sample: int) -> Episode:
        settings, encode = self._settings, self._pieces.encode
        draw = random.Random(f"{settings.seed}/{sample}")
        names = draw.sample(NAMES, settings.keys)
        numbers = draw.sample(range(10_000, 100_000), settings.keys)
        needles = [
            encode(_NEEDLE.format(name=name, number=number)) for name, number in zip(names, numbers, strict=True)
        ]
        head = [*self._pieces.start, *encode(_TASK, "")]
        room = length - len(head) - sum(map(len, needles))
        if room < 0:
            least = length - room
            raise settings.error("tokens", f"{settings.keys} keys take {least} tokens without any filler", "Raise it.")
        filler = list(itertools.chain(*(encode(sentence) for sentence in FILLER)))
        sentences = itertools.cycle(encode(sentence) for sentence in FILLER)
        ids, used = head, 0
        for place, needle in enumerate(needles):
            # Key i of n stands behind (i + 1/2)/n of the filler, at the end of a sentence.
            while used < (place + 0.5) / settings.keys * room - len(filler) / 2 / len(FILLER):
                sentence = next(sentences)
                if used + len(sentence) > room:
                    break
                ids = [*ids, *sentence]
                used += len(sentence)
            ids = [*ids, *needle]
        while used < room:
            sentence = next(sentences)[: room - used]
            ids = [*ids, *sentence]
            used += len(sentence)
        asked = draw.sample(range(settings.keys), min(settings.asked, settings.keys))
        probes = tuple(
            self._pieces.question(_QUESTION.format(name=names[one]), f" {numbers[one]}") for one in sorted(asked)
        )
        return Episode(as_ids(ids), probes)
