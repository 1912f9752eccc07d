"""The sources of a mixture, opened from their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lightning_fot.config.sources import (
    FOR_TEXT,
    DictionarySettings,
    FactsSettings,
    FiniteSettings,
    HuggingFaceSettings,
    InstructionsSettings,
    PasskeySettings,
    RecallSettings,
    SourceSettings,
    TextSettings,
)
from lightning_fot.data.mixture.base import MixtureSource
from lightning_fot.data.mixture.dictionary import DictionarySource
from lightning_fot.data.mixture.facts import FactsSource, RecallSource
from lightning_fot.data.mixture.hub import HuggingFaceSource
from lightning_fot.data.mixture.passkey import PasskeySource
from lightning_fot.data.mixture.texts import InstructionsSource, TextSource
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError


def open_sources(
    settings: Sequence[SourceSettings],
    defaults: dict[str, Any],
    encoder: TextEncoder,
    seed: int,
    say: Callable[[str], None],
) -> list[MixtureSource]:
    """Open the sources of a mixture; what one holds out, no other trains on.

    Args:
        settings: Of each source.
        defaults: Values for settings that a source leaves open, by name.
        encoder: Text to ids.
        seed: The data module's.
        say: Called with what users should know.

    Raises:
        SettingError: A source is empty, or cannot be opened.
    """
    sources = [_open(_filled(one, defaults), encoder, seed, say) for one in settings]
    for source in sources:
        others = frozenset().union(*(other.heldout_keys for other in sources if other is not source))
        if others:
            source.leave_out(others)
    return sources


def check_enough(sources: Sequence[MixtureSource], streams: int, tokens: int | None) -> None:
    """Check what can be known about a mixture before it is read.

    Args:
        sources: All of them.
        streams: Documents read side by side.
        tokens: Tokens that the training will read; None when that is not known.

    Raises:
        SettingError: A source holds all its documents out, there are fewer documents than streams, or all sources end
            before the training does.
    """
    for source in sources:
        source.check_training()
    counts = [source.count for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) == len(counts) and sum(known) < streams:
        raise SettingError(
            "data.sources",
            [source.setting for source in sources],
            f"have {sum(known):,} documents together, but {streams:,} are read side by side",
            "Add documents or a source without end, or lower data.batch_size.",
        )
    most = 0
    for source in sources:
        if source.passes is None or source.most_tokens is None:
            return
        most += source.passes * source.most_tokens
    if tokens is not None and most < tokens:
        raise exhausted(sources, f"{most:,} tokens at most, but the training reads {tokens:,}")


def exhausted(sources: Sequence[MixtureSource], problem: str) -> SettingError:
    """The error where no source has a document left."""
    return SettingError(
        "data.sources",
        [f"{source.setting}.passes={source.passes}" for source in sources],
        f"all sources are exhausted: {problem}",
        "Raise passes or leave it out, add a source, or lower trainer.max_steps.",
    )


def _filled(settings: SourceSettings, defaults: dict[str, Any]) -> SourceSettings:
    """The settings with the data module's own where they leave something open."""
    taken = {
        name: value
        for name, value in defaults.items()
        if name in settings.names()
        and getattr(settings, name) is None
        and (name not in FOR_TEXT or isinstance(settings, TextSettings))
    }
    if isinstance(settings, InstructionsSettings):
        taken.pop("min_tokens", None)  # conversations are short; a window is no measure for them
    filled = dataclasses.replace(settings, **taken)
    limit = getattr(filled, "max_document_tokens", None)
    if isinstance(filled, FiniteSettings) and limit is not None and limit < (filled.min_tokens or 1):
        raise SettingError(
            f"{settings.setting}.max_document_tokens",
            limit,
            f"is below the {filled.min_tokens} tokens that a document must have",
            f"Raise it, or lower {settings.setting}.min_tokens.",
        )
    return filled


def _open(settings: SourceSettings, encoder: TextEncoder, seed: int, say: Callable[[str], None]) -> MixtureSource:
    if isinstance(settings, TextSettings):
        return TextSource(settings, encoder, seed, say)
    if isinstance(settings, HuggingFaceSettings):
        return HuggingFaceSource(settings, encoder, seed, say)
    if isinstance(settings, InstructionsSettings):
        return InstructionsSource(settings, encoder, seed, say)
    if isinstance(settings, DictionarySettings):
        return DictionarySource(settings, encoder.tokenizer, seed)
    if isinstance(settings, FactsSettings):
        return FactsSource(settings, encoder, seed)
    if isinstance(settings, RecallSettings):
        return RecallSource(settings, encoder, seed)
    assert isinstance(settings, PasskeySettings)  # the last of the kinds
    return PasskeySource(settings, encoder.tokenizer, seed)
