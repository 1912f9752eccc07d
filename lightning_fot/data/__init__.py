"""Documents, their tokens, and the rows that crossbatch training reads.

Importing this package imports neither torch nor lightning; the names below load when first used.
"""

from typing import TYPE_CHECKING

from lightning_fot._lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fot.data.datamodule import CrossbatchDataModule as CrossbatchDataModule
    from lightning_fot.data.mixture.passkey import PasskeyExample as PasskeyExample
    from lightning_fot.data.mixture.passkey import passkey_prompt as passkey_prompt
    from lightning_fot.data.text.documents import Document as Document
    from lightning_fot.data.text.readers import check_paths as check_paths
    from lightning_fot.data.text.readers import find_documents as find_documents

_HOME = {
    "CrossbatchDataModule": "datamodule",
    "Document": "text.documents",
    "PasskeyExample": "mixture.passkey",
    "check_paths": "text.readers",
    "find_documents": "text.readers",
    "passkey_prompt": "mixture.passkey",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME)
