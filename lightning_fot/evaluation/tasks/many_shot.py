"""Many-shot classification: as many labelled examples in the memory as it holds (FoT paper, section 5.2, TREC)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lightning_fot.config.tasks import ManyShotTask
from lightning_fot.evaluation.tasks.parts.episode import Episode, Probe
from lightning_fot.evaluation.tasks.parts.text import Pieces, as_ids, fill

_PROMPT = "Text: {text}\nLabel:"


def read_examples(settings: ManyShotTask) -> list[tuple[str, str]]:
    """Label and text of each line of the file, ``LABEL text`` or ``LABEL:sub text``.

    Raises:
        SettingError: The file cannot be read, or a line has no text.
    """
    path = Path(settings.path).expanduser()
    try:
        # A label file in another encoding, as TREC's, loses its accents and nothing else.
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise settings.error("path", f"cannot be read ({error.strerror})", "Give a file of LABEL text lines.") from None
    examples = []
    for number, line in enumerate(lines, 1):
        label, _, text = line.strip().partition(" ")
        if not label:
            continue
        if not text.strip():
            raise settings.error("path", f"line {number} has a label and no text", "Write LABEL text on each line.")
        examples.append((label if settings.fine else label.partition(":")[0], text.strip()))
    return examples


class ManyShot:
    """The same questions behind more and more demonstrations; none is asked for that was shown.

    Args:
        settings: What is asked.
        tokenizer: A Hugging Face tokenizer.
        local: Tokens that a question may take, its local demonstrations included.

    Raises:
        SettingError: The file has too few examples.
    """

    def __init__(self, settings: ManyShotTask, tokenizer: Any, local: int) -> None:
        examples = read_examples(settings)
        needed = settings.questions + settings.local + 1
        if len(examples) < needed:
            raise settings.error(
                "path", f"has {len(examples)} examples and {needed} are needed", "Ask fewer questions."
            )
        random.Random(f"{settings.seed}").shuffle(examples)
        self._pieces = Pieces(tokenizer)
        labels = sorted({label for label, _ in examples})
        self._choices = [f" {label}\n\n" for label in labels]
        asked, rest = examples[: settings.questions], examples[settings.questions :]
        self._near, self._far = rest[: settings.local], rest[settings.local :]
        self._probes = tuple(self._probe(label, text, local) for label, text in asked)
        self._shown = [self._demonstration(label, text) for label, text in self._far]

    def episodes(self, length: int) -> list[Episode]:
        """One: whole demonstrations, as many as ``length`` tokens and the file hold, and the questions."""
        ids, _ = fill(self._shown, length - len(self._pieces.start))
        return [Episode(as_ids([*self._pieces.start, *ids]), self._probes)]

    def _demonstration(self, label: str, text: str) -> tuple[int, ...]:
        return self._pieces.encode(_PROMPT.format(text=text) + f" {label}\n\n")

    def _probe(self, label: str, text: str, local: int) -> Probe:
        """The question behind as many local demonstrations as fit."""
        prompt, answer = _PROMPT.format(text=text), f" {label}\n\n"
        alone = self._pieces.question(prompt, answer, self._choices)
        near = [self._demonstration(*example) for example in self._near]
        return self._pieces.question(prompt, answer, self._choices, fill(near, local - len(alone.ids))[0])
