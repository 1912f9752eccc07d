"""Data sets of the library ``datasets`` (an extra), streamed, as a source of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from lightning_fot.config.sources import HuggingFaceSettings, missing_datasets
from lightning_fot.data.mixture.base import MixtureSource
from lightning_fot.data.rows.sequences import Specials, TextSequence, TokenSequence
from lightning_fot.data.text.documents import Document
from lightning_fot.data.text.tokens import Ids, TextEncoder
from lightning_fot.errors import SettingError

# Held-out rows are among so many first ones, so that they are found without reading a stream to its end.
HELDOUT_ROWS = 1000
# Rows longer than this are encoded piece by piece, not as a whole beside others.
_AHEAD_CHARACTERS = 1024 * 1024


class HuggingFaceSource(MixtureSource):
    """Rows of a data set, a row being a document.

    The order of a pass is a function of the seed and the number of the pass, so a resumed run reads on where it
    stopped; for that it goes through the rows before once more (ids of those of 4,000 characters and more are on disk).

    Args:
        settings: Which data set; what it leaves open has been filled in.
        encoder: Text to ids.
        seed: Of the order and of the held-out draw.
        say: Called with what users should know.

    Raises:
        SettingError: The data set cannot be opened, or has no such column of text.
        MissingLibraryError: ``datasets`` is not installed.
    """

    def __init__(
        self, settings: HuggingFaceSettings, encoder: TextEncoder, seed: int, say: Callable[[str], None]
    ) -> None:
        super().__init__(settings.setting, settings.weight, settings.passes)
        self._settings = settings
        self._encoder = encoder
        self._specials = Specials.of(encoder.tokenizer)
        self._seed = seed
        self._rows = _open(settings)
        group = max(2, round(1 / (settings.heldout_fraction or 0.1)))
        draw = np.random.default_rng(seed).integers(group, size=-(-HELDOUT_ROWS // group))
        self._heldout_rows = {number * group + int(place) for number, place in enumerate(draw)}
        self._check_column()
        say(f"{settings.setting}: data set {settings.dataset}, of whose first {HELDOUT_ROWS:,} rows every {group}th is "
            "held out.")  # fmt: skip

    def documents(self, number: int) -> Iterator[TokenSequence]:
        """Rows that are not held out, shuffled within the buffer."""
        rows = ((index, text) for index, text in self._texts() if index not in self._heldout_rows)
        shuffled = _shuffled(rows, self._settings.shuffle_buffer, np.random.default_rng([self._seed, number]))
        for index, text, encoded in self._encoder.in_order(self._ahead, shuffled):
            ids, cut = self._encoder.encode([text], self._settings.max_document_tokens) if encoded is None else encoded
            if len(ids) >= (self._settings.min_tokens or 1):
                yield self._sequence(index, ids, cut)

    def heldout(self) -> Iterator[TokenSequence]:
        """The held-out rows."""
        held = self._heldout(self._settings.max_document_tokens)
        return (self._sequence(index, ids, cut) for index, ids, cut in held)

    def heldout_documents(self, min_tokens: int) -> Iterator[Document]:
        """The same as text, whole."""
        for index, ids, _ in self._heldout(None):
            if len(ids) >= min_tokens:
                yield Document(f"{self._settings.dataset}:{index}", ids, self._encoder.tokenizer)

    @property
    def heldout_keys(self) -> frozenset[Hashable]:
        """Rows that are held out."""
        return frozenset(self._key(index) for index in self._heldout_rows)

    @property
    def mark(self) -> object:
        """Its settings; what the hub gives under them is trusted to stay the same, so name a revision."""
        return repr(self._settings), self._seed

    def _key(self, index: int) -> Hashable:
        one = self._settings
        return one.dataset, one.name, one.split, str(one.data_files), one.revision, index

    def _texts(self) -> Iterator[tuple[int, str]]:
        field = self._settings.text_field or "text"
        for index, row in enumerate(self._rows):
            text = row.get(field)
            if isinstance(text, str) and text.strip():
                yield index, text

    def _heldout(self, limit: int | None) -> Iterator[tuple[int, Ids, bool]]:
        for index, text in self._texts():
            if index >= HELDOUT_ROWS:
                return
            if index in self._heldout_rows:
                ids, cut = self._encoder.encode([text], limit)
                if len(ids) >= (self._settings.min_tokens or 1):
                    yield index, ids, cut

    def _ahead(self, row: tuple[int, str]) -> tuple[int, str, tuple[Ids, bool] | None]:
        index, text = row
        if len(text) > _AHEAD_CHARACTERS:
            return index, text, None
        return index, "", self._encoder.encode_alone([text], self._settings.max_document_tokens)

    def _sequence(self, index: int, ids: Ids, cut: bool) -> TextSequence:
        after = None if cut else self._specials.eos
        sequence = TextSequence(ids, self._specials.bos, after, frozenset({self._key(index)}))
        sequence.name = f"{self._settings.dataset}:{index}"
        return sequence

    def _check_column(self) -> None:
        field = self._settings.text_field or "text"
        row = next(iter(self._rows), None)
        if row is None:
            raise SettingError(
                f"{self.setting}.dataset", self._settings.dataset, "has no rows", "Name another split or data set."
            )
        if not isinstance(row.get(field), str):
            columns = ", ".join(sorted(row)) or "none"
            raise SettingError(
                f"{self.setting}.text_field", field, f"is no column of text; the columns are {columns}", "Name one."
            )


def _open(settings: HuggingFaceSettings) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_datasets(settings, None if isinstance(error, ModuleNotFoundError) else str(error)) from error
    try:
        return datasets.load_dataset(
            settings.dataset,
            settings.name,
            split=settings.split,
            data_files=settings.data_files,
            revision=settings.revision,
            streaming=settings.streaming,
        )
    except Exception as error:  # the library raises what its file systems raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingError(
            f"{settings.setting}.dataset",
            settings.dataset,
            f"cannot be opened ({first})",
            "Check name, split, data_files and the network.",
        ) from error


def _shuffled(rows: Iterator[tuple[int, str]], size: int, random: np.random.Generator) -> Iterator[tuple[int, str]]:
    """Rows in an order that the generator decides, drawn from a buffer of ``size``."""
    buffer: list[tuple[int, str]] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = int(random.integers(size))
        yield buffer[place]
        buffer[place] = row
    for place in random.permutation(len(buffer)).tolist():
        yield buffer[place]
