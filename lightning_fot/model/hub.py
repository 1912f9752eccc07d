"""Saved models, deltas and memories to the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning_fot.errors import SettingError
from lightning_fot.memory.data_files import INDEX_FILE
from lightning_fot.memory.on_disk import saved_files
from lightning_fot.pretrained.folder import DELTA_FILE
from lightning_fot.pretrained.hub import upload
from lightning_fot.pretrained.longllama import SETTINGS_FILE

# What an earlier upload may have had under other names.
_OF_MEMORIES = ("memory-*.safetensors", "log-*.safetensors")
_OF_MODELS = ("*.safetensors", "*.safetensors.index.json")


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload with lightning-fot",
) -> str:
    """Uploads what this package has saved: a model, a delta, or a memory (as a data set), with its card.

    Files that it did not save are left here; so is what a library of ``lightning ingest`` says of this machine. A
    memory holds the text of its documents.

    Args:
        folder: As ``save_pretrained``, ``lightning export`` or ``Memory.save`` has written it.
        repo_id: Of the hub, as ``user/name``.
        private: Whether a repository that is made can be seen by its owner alone.
        token: Of the hub; None takes that of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch; None is the main one.
        message: Of the commit.

    Returns:
        Address of the commit.

    Raises:
        SettingError: The folder is none of these, the hub cannot be reached, or refuses.
    """
    path = Path(folder).expanduser()
    if (path / INDEX_FILE).is_file():
        files, kind, outdated = saved_files(path), "dataset", _OF_MEMORIES
    else:
        files, kind, outdated = _files_of_model(path), "model", _OF_MODELS
    return upload(
        path, files, repo_id, repo_type=kind, private=private, token=token, revision=revision, message=message,
        outdated=outdated,
    )  # fmt: skip


def _files_of_model(path: Path) -> list[str]:
    for name in (SETTINGS_FILE, DELTA_FILE):
        try:
            listed = json.loads((path / name).read_text(encoding="utf-8"))["files"]
            # Names alone: a list may not name what lies elsewhere.
            return [str(one) for one in listed if Path(str(one)).name == one and (path / one).is_file()]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError("folder", str(path), f"is damaged ({name}: {error})", "Save it again.") from error
    raise SettingError(
        "folder", str(path), "holds no model, delta or memory that this package saved",
        "Give a folder of save_pretrained, lightning export or Memory.save.",
    )  # fmt: skip
