"""Writing an attached model as a plain Hugging Face folder.

Anyone opens the folder with ``AutoModelForCausalLM``, without this package, and has the backbone's logits.
:func:`lightning_fot.model.attach.attach_pretrained` opens it with its memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.pretrained.card import CARD, CARD_DIGEST, HINT, write_card
from lightning_fot.pretrained.folder import DIGESTS, check_target, portable_settings
from lightning_fot.pretrained.longllama import FORMAT, GATES_FILE, SETTINGS_FILE, longllama_keys
from lightning_fot.system.digests import file_digest, write_sealed
from lightning_fot.system.files import replacing, write_json
from lightning_fot.system.tensor_files import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.model.backbone.attachment import Attachment


def save_attached(
    attached: Attachment, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Writes weights, memory settings and gates; see :meth:`lightning_fot.model.lm.MemoryLM.save_pretrained`.

    The files are written beside ``folder`` and then take its name: stopped at any moment, ``folder`` is the old model,
    the new one or, for an instant between two renames, missing; never a mixture.

    Returns:
        The folder.

    Raises:
        SettingError: The retriever has no name, or the folder holds something else.
    """
    settings = portable_settings(attached.config)
    target = check_target(folder)
    with replacing(target) as fresh:
        _write(attached, fresh, settings, tokenizer)
    return target


def _write(
    attached: Attachment, folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    attached.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(attached.model.dtype).removeprefix("torch.")
    # Whoever prints the configuration of what transformers opens reads where the memory is.
    keys = longllama_keys(attached.config, attached.memory_layers, dtype) | {"memory_hint": f"open with {HINT}"}
    write_json(folder / "config.json", config | keys)
    if len(attached.gates):
        gates = {str(layer): gate.detach().cpu().contiguous() for layer, gate in attached.gates.items()}
        save_tensors(folder / GATES_FILE, gates)
    names = sorted(path.name for path in folder.iterdir())
    card = write_card(folder, str(attached.model.config.name_or_path), settings)
    files = sorted([*names, CARD, SETTINGS_FILE])
    content = {"format": FORMAT, "memory": settings, CARD_DIGEST: card, "files": files}
    write_sealed(folder / SETTINGS_FILE, {**content, DIGESTS: {name: file_digest(folder / name) for name in names}})
