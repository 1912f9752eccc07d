"""What a saved folder is: its settings file, and whether a folder may be replaced."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.config.memory import OF_THE_MACHINE, without_later
from lightning_fot.errors import SettingError
from lightning_fot.pretrained.card import CARD, is_own
from lightning_fot.pretrained.longllama import SETTINGS_FILE
from lightning_fot.system.digests import check_files, read_sealed

if TYPE_CHECKING:
    from lightning_fot.config.memory import MemoryConfig

# What says of a folder that it is a difference from a backbone, and what it holds.
DELTA_FILE = "lightning_fot_delta.json"
# Of the other files of a saved model, in its settings file.
DIGESTS = "digests"
_WEIGHTS = (".safetensors", ".bin")


def portable_settings(config: MemoryConfig) -> dict[str, Any]:
    """The settings as JSON can hold them, without those of the machine.

    Raises:
        SettingError: The retriever is a Python object, which a file cannot name.
    """
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in OF_THE_MACHINE
    }
    try:
        json.dumps(settings["retriever"])
    except (TypeError, ValueError):
        raise SettingError(
            "model.memory.retriever",
            settings["retriever"],
            "is a Python object, which a saved model cannot name",
            'Set lm.config.retriever to a name, {"name": ..., **arguments} or "package.module.Class" before saving.',
        ) from None
    return without_later(settings)


def check_saved(name: str, weights: bool = True) -> None:
    """Compares the files of a model that this package saved with their digests; other folders have none.

    Args:
        name: Of the backbone; what is no folder is not looked at.
        weights: Whether its weights are compared too, for which they are read once.

    Raises:
        SettingError: A file was altered since.
    """
    folder = Path(name).expanduser()
    if not (folder / SETTINGS_FILE).is_file():
        return
    try:
        digests = read_sealed(folder / SETTINGS_FILE).get(DIGESTS, {})
        check_files(folder, {file: one for file, one in digests.items() if weights or not file.endswith(_WEIGHTS)})
    except (OSError, ValueError, AttributeError) as error:
        raise SettingError(
            "model.backbone",
            name,
            str(error),
            f'Save or export the model again; if the change is meant, take "{DIGESTS}" and "sha256" out of '
            f"{SETTINGS_FILE}.",
        ) from error


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder to write, as a real path.

    Raises:
        SettingError: It is a file, or holds anything but a model that this package saved.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise SettingError("folder", str(folder), "is a file", "Give a folder.")
    written = set[str]()
    for file in (SETTINGS_FILE, DELTA_FILE):
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((target / file).read_text(encoding="utf-8"))
            written |= set(said["files"]) - (set() if is_own(target, said) else {CARD})
    foreign = sorted({path.name for path in target.iterdir()} - written)
    if foreign:
        raise SettingError(
            "folder",
            str(folder),
            f"holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}, which would be lost",
            "Choose another folder, or empty it.",
        )
    return target
