"""``lightning export``: the model of a run as a plain Hugging Face folder, with its tokenizer and memory settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fot.errors import SettingError


def export(words: Sequence[str], program: str) -> int:
    """Merges a run's last checkpoint into its backbone and saves the whole.

    Args:
        words: The run folder, and the folder to write.
        program: How the user called the command.

    Returns:
        Exit code.

    Raises:
        SettingError: The run has no checkpoint, its backbone is gone, or the folder cannot be written.
    """
    usage = f"{program} RUN_FOLDER OUT"
    if words and words[0] in ("-h", "--help"):
        print(
            f"Usage: {usage}\n\nWrites the model of RUN_FOLDER's last checkpoint to the folder OUT, for transformers."
        )
        return 0
    if len(words) != 2 or any(word.startswith("-") for word in words):
        raise SettingError(
            "arguments", " ".join(words), "must be a run folder and a folder to write", f"Write: {usage}"
        )
    # The cheapest possible failure first: nothing below imports torch before all is known to fit.
    from lightning_fot.run_folder import RunFolder
    from lightning_fot.saving import check_target

    run, target = RunFolder(Path(words[0]).expanduser()), check_target(words[1])
    settings = _model_settings(run.config)
    if not run.last_checkpoint.is_file():
        raise SettingError(
            "RUN_FOLDER",
            words[0],
            "has no checkpoints/last.ckpt",
            "Give a folder of lightning run or fit that trained.",
        )
    from lightning_fot.pretrained import check_backbone

    check_backbone(settings["backbone"])
    steps = _export(settings, run.last_checkpoint, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 2**20
    print(
        f"Model after {steps} steps: {target} ({size:.0f} MiB). Open it with transformers' AutoModelForCausalLM; with "
        "its memory, with lightning_fot.attach_pretrained or --model.backbone."
    )
    return 0


def _model_settings(file: Path) -> dict[str, Any]:
    """The section ``model`` of a run's resolved configuration."""
    import yaml

    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        return {**model, "backbone": str(model["backbone"]), "memory": dict(model["memory"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise SettingError(
            "RUN_FOLDER", str(file.parent), "has no config.yaml of a run", "Give a folder of lightning run or fit."
        ) from None


def _export(settings: dict[str, Any], checkpoint: Path, target: Path) -> int:
    from lightning_fot.config import MemoryConfig
    from lightning_fot.module import FocusedTransformer
    from lightning_fot.pretrained import load_tokenizer
    from lightning_fot.training import load_trained

    chosen = {name: settings[name] for name in ("trainable", "dtype") if name in settings}
    module = FocusedTransformer(settings["backbone"], MemoryConfig(**settings["memory"]), **chosen)
    loaded = load_trained(module, checkpoint)
    if module.lora is not None:
        from lightning_fot.parameters import merge_lora

        merge_lora(module.lm.model)
    module.lm.save_pretrained(target, load_tokenizer(settings["backbone"]))
    return int(loaded["global_step"])
