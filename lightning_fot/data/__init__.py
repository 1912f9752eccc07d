"""Documents, their tokens, and the rows that crossbatch training reads.

Importing this package imports neither torch nor lightning; the names below load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fot.data.datamodule import CrossbatchDataModule as CrossbatchDataModule
    from lightning_fot.data.documents import Document as Document
    from lightning_fot.data.passkey import PasskeyExample as PasskeyExample
    from lightning_fot.data.passkey import passkey_prompt as passkey_prompt
    from lightning_fot.data.readers import check_paths as check_paths
    from lightning_fot.data.readers import find_documents as find_documents

_HOME = {
    "CrossbatchDataModule": "datamodule",
    "Document": "documents",
    "PasskeyExample": "passkey",
    "check_paths": "readers",
    "find_documents": "readers",
    "passkey_prompt": "passkey",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
