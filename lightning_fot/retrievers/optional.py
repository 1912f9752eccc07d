"""Importing the optional libraries behind retrievers."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lightning_fot.config.retriever import SETTING
from lightning_fot.errors import MissingLibraryError


def require(library: str, distribution: str, retriever: str) -> ModuleType:
    """Import a library; call it after torch is loaded.

    Args:
        library: Import name.
        distribution: What ``pip install`` takes.
        retriever: Name of the retriever that needs it.

    Raises:
        MissingLibraryError: It cannot be imported.
    """
    try:
        return import_module(library)
    except ImportError as error:
        reason = None if isinstance(error, ModuleNotFoundError) else str(error)
        raise MissingLibraryError(library, f"pip install {distribution}", f"{SETTING}={retriever}", reason) from error
