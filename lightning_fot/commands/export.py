"""``lightning export``: the model of a run as a plain Hugging Face folder, or its difference from the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError
from lightning_fot.request.words import Option, Verb, read

VERB = Verb(
    "lightning export",
    (Option("delta", "write only what training changed, a few megabytes, for --model.backbone", None, False),),
    plain=("RUN_FOLDER", "OUT"),
    plain_about=("folder of lightning run or fit", "folder to write, for transformers"),
    about="Writes the model of a run's last checkpoint as a Hugging Face folder.",
)


def export(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Merges a run's last checkpoint into its backbone and saves the whole, or the difference.

    Args:
        words: The run folder, and the folder to write; ``--delta`` for the difference.
        program: How the user called the command.
        debug: Not used: every verb is called alike.

    Returns:
        Exit code.

    Raises:
        SettingError: The run has no checkpoint, its backbone is gone, or the folder cannot be written.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    source, out = given.plain
    # The cheapest possible failure first: nothing below imports torch before all is known to fit.
    from lightning_fot.pretrained.folder import check_target
    from lightning_fot.training.run_folder import RunFolder

    run, target = RunFolder(Path(source).expanduser()), check_target(out)
    settings = _model_settings(run.config)
    if not run.last_checkpoint.is_file():
        raise SettingError(
            "RUN_FOLDER",
            source,
            "has no checkpoints/last.ckpt",
            "Give a folder of lightning run or fit that trained.",
        )
    from lightning_fot.pretrained.backbones import check_backbone

    check_backbone(settings["backbone"])
    steps = (_export_delta if given.options.delta else _export)(settings, run.last_checkpoint, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 2**20
    opened = (
        "--model.backbone, and with lightning_fot.attach_pretrained"
        if given.options.delta
        else "transformers' AutoModelForCausalLM; with its memory, with lightning_fot.attach_pretrained or "
        "--model.backbone"
    )
    print(f"Model after {steps} steps: {target} ({size:.0f} MiB). Open it with {opened}.")
    return 0


def _model_settings(file: Path) -> dict[str, Any]:
    """The section ``model`` of a run's resolved configuration."""
    import yaml

    from lightning_fot.config.attending.renamed import current

    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        return {**model, "backbone": str(model["backbone"]), "memory": current(model["memory"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise SettingError(
            "RUN_FOLDER", str(file.parent), "has no config.yaml of a run", "Give a folder of lightning run or fit."
        ) from None


def _export(settings: dict[str, Any], checkpoint: Path, target: Path) -> int:
    from lightning_fot.pretrained.backbones import load_tokenizer
    from lightning_fot.training.opening import open_trained

    module, steps = open_trained(settings, checkpoint)
    module.lm.save_pretrained(target, load_tokenizer(settings["backbone"]))
    return steps


def _export_delta(settings: dict[str, Any], checkpoint: Path, target: Path) -> int:
    from lightning_fot.config.attending import registry
    from lightning_fot.config.attending.base import SETTING
    from lightning_fot.pretrained.backbones import load_backbone
    from lightning_fot.pretrained.delta import write_delta
    from lightning_fot.training.opening import open_trained

    way = registry.read(settings["memory"].get("attending"))
    if way.learns:
        raise SettingError(
            SETTING, way.name, "has trained parameters of its own, which are no difference", "Leave out --delta."
        )
    module, steps = open_trained(settings, checkpoint)
    base = load_backbone(settings["backbone"], settings.get("dtype", "float32"))
    before, after = dict(base.named_parameters()), dict(module.lm.model.named_parameters())
    write_delta(target, settings["backbone"], module.lm.config, before, after, {"steps": steps})
    return steps
