"""Delta weights: what training changed in a backbone, as a folder of a few megabytes beside the backbone it belongs to.

``lightning export RUN OUT --delta`` writes one; ``model.backbone: OUT`` opens it, with the memory it was trained with.
The package ships some, by name (:data:`SHIPPED`). Imports no torch before weights are needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.pretrained.folder import DELTA_FILE
from lightning_fot.system.digests import read_sealed, write_sealed
from lightning_fot.system.package import shipped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lightning_fot.config.memory import MemoryConfig

WEIGHTS_FILE = "delta.safetensors"
CONFIG_FILE = "config.json"
FORMAT = 1
# Behind the name of a weight: factors of a difference of low rank, B @ A, as LoRA names them (arXiv 2106.09685).
_DOWN, _UP = ".lora_A", ".lora_B"
# Names of those that come with the package, and their folders in it.
SHIPPED = {"smollm2-135m-fot": shipped("weights", "smollm2_135m_fot")}


@dataclass(frozen=True)
class Delta:
    """A fine-tuned backbone, told by another one and what to add to its weights.

    Args:
        name: What it was asked for by.
        base: The backbone that it changes, by any of the names that backbones have.
        folder: Where its settings and weights are.
        chat_template: In place of the base's: the form in which training asked. None leaves the base's.
        answer_stops: Texts that end an answer in that form.
        quotes: Passages of the memory that a question is asked behind.
    """

    name: str
    base: str
    folder: Path
    chat_template: str | None = None
    answer_stops: tuple[str, ...] = ()
    quotes: int = 0

    @property
    def settings(self) -> Path:
        """What it says of itself, and of the memory that it was trained with."""
        return self.folder / DELTA_FILE

    @property
    def weights(self) -> Path:
        """Differences by name of the parameter."""
        return self.folder / WEIGHTS_FILE


def find_delta(name: str) -> Delta | None:
    """The delta of this name or in this folder; None where there is none.

    Raises:
        SettingError: Its settings cannot be read, or its weights are missing.
    """
    folder = SHIPPED.get(name) or Path(name).expanduser()
    file = folder / DELTA_FILE
    if not file.is_file():
        return None
    try:
        said = read_sealed(file)
        template = said.get("chat_template")
        stops = tuple(str(stop) for stop in said.get("answer_stops", ()))
        template = None if template is None else str(template)
        found = Delta(name, str(said["base"]), folder, template, stops, int(said.get("quotes", 0)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(name, f"{DELTA_FILE} cannot be read ({error})") from error
    if not found.weights.is_file():
        raise _unusable(name, f"{WEIGHTS_FILE} is missing")
    if found.base == name:
        raise _unusable(name, "it is its own base")
    return found


def add_delta(model: nn.Module, delta: Delta) -> None:
    """Adds the differences to a model's weights.

    Args:
        model: The base, as it was loaded.
        delta: What to add.

    Raises:
        SettingError: The file is damaged, or its parameters are not this model's.
    """
    import torch

    from lightning_fot.system.tensor_files import load_tensors

    try:
        changes = load_tensors(delta.weights)
    except (OSError, ValueError) as error:
        raise _unusable(delta.name, f"{WEIGHTS_FILE} cannot be read ({error})") from error
    parameters = dict(model.named_parameters())
    factored = [name.removesuffix(_DOWN) for name in changes if name.endswith(_DOWN)]
    alone = next((name for name in factored if name + _UP not in changes), None)
    if alone is not None:
        raise _not_of(delta, alone + _DOWN)
    factors = {name: (changes.pop(name + _DOWN), changes.pop(name + _UP)) for name in factored}
    for name, change in changes.items():
        if name not in parameters or parameters[name].shape != change.shape:
            raise _not_of(delta, name)
    for name, (down, up) in factors.items():
        weight = parameters.get(name)
        if weight is None or down.ndim != 2 or up.ndim != 2 or weight.shape != (len(up), down.shape[1]):
            raise _not_of(delta, name + _DOWN)
        if up.shape[1] != len(down):
            raise _not_of(delta, name + _DOWN)
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].copy_(parameters[name].float() + change.float())
        for name, (down, up) in factors.items():
            parameters[name].copy_(parameters[name].float() + up.float() @ down.float())


def write_delta(
    folder: str | os.PathLike[str],
    base: str,
    memory: MemoryConfig,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Path:
    """Writes the differences of parameters, in bfloat16: within 0.4 % of each difference or factor.

    Args:
        folder: Made if it is not there; a delta or a saved model in it is replaced as a whole.
        base: The backbone that ``before`` is of, as it is to be found when the folder is opened.
        memory: What it was trained with.
        before: Parameters of the base by name.
        after: Parameters after training, of the same names and shapes; those that are equal are left out.
        facts: Of the training, for the reader.
        factors: More differences, by the name of the weight (out, in): A (rank, in) and B (out, rank) of ``B @ A``.

    Returns:
        The folder.

    Raises:
        SettingError: Nothing differs, or the folder cannot be written.
    """
    import torch

    from lightning_fot.pretrained.card import CARD, CARD_DIGEST, HINT, write_card
    from lightning_fot.pretrained.folder import check_target, portable_settings
    from lightning_fot.system.files import replacing, write_json
    from lightning_fot.system.tensor_files import save_tensors

    changes = {}
    for name, parameter in after.items():
        change = parameter.detach().float().cpu() - before[name].detach().float().cpu()
        if bool(change.any()):
            changes[name] = change.to(torch.bfloat16).contiguous()
    for name, (down, up) in (factors or {}).items():
        changes[name + _DOWN] = down.detach().cpu().to(torch.bfloat16).contiguous()
        changes[name + _UP] = up.detach().cpu().to(torch.bfloat16).contiguous()
    if not changes:
        raise SettingError("RUN_FOLDER", str(folder), "its weights are those of the backbone", "Train it first.")
    target = check_target(folder)
    settings = {"format": FORMAT, "base": base, "memory": portable_settings(memory), **facts}
    with replacing(target) as fresh:
        save_tensors(fresh / WEIGHTS_FILE, changes, {"format": "pt"})
        # Transformers names the type of a model that it does not know: whoever opens the folder so reads what to do.
        write_json(fresh / CONFIG_FILE, {"model_type": f"a difference from a backbone: open it with {HINT}"})
        card = write_card(fresh, base, settings["memory"], delta=True)
        files = [DELTA_FILE, WEIGHTS_FILE, CONFIG_FILE, CARD]
        write_sealed(fresh / DELTA_FILE, {**settings, CARD_DIGEST: card, "files": files})
    return target


def _not_of(delta: Delta, name: str) -> SettingError:
    return _unusable(delta.name, f"{name} is not a parameter of {delta.base}, or of another shape")


def _unusable(name: str, problem: str, fix: str = "Export it again: lightning export RUN OUT --delta.") -> SettingError:
    return SettingError("model.backbone", name, problem, fix)
