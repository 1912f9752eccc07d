"""Checks the sources of a mixture against the disk and the installed libraries."""

from __future__ import annotations

from importlib.util import find_spec

from lightning_fot.config.sources import (
    HuggingFaceSettings,
    InstructionsSettings,
    MadeOfTextSettings,
    TextSettings,
    missing_datasets,
    read_sources,
)


def check_sources(sources: object, text_field: str = "text", setting: str = "data.sources") -> None:
    """Check what can be known about a mixture without a tokenizer: also its files, and the libraries that it needs.

    Raises:
        SettingError: As ``read_sources``; a path is missing, or a file has no text.
        MissingLibraryError: A data set of ``datasets`` is named, which is not installed.
    """
    from lightning_fot.data.mixture.conversations import find_conversations
    from lightning_fot.data.text.readers import check_paths

    for source in read_sources(sources, setting):
        if isinstance(source, TextSettings):
            for name in ("paths", "heldout"):
                check_paths(
                    getattr(source, name),
                    min_tokens=source.min_tokens or 1,
                    text_field=source.text_field or text_field,
                    max_documents=source.max_documents,
                    setting=f"{source.setting}.{name}",
                )
        elif isinstance(source, InstructionsSettings):
            find_conversations(source)
        elif isinstance(source, MadeOfTextSettings):
            check_paths(source.paths, text_field=text_field, setting=f"{source.setting}.paths")
        elif isinstance(source, HuggingFaceSettings) and find_spec("datasets") is None:
            raise missing_datasets(source)
