"""The complete check of a configuration by jsonargparse, and the objects it describes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from omegaconf.errors import OmegaConfBaseException

from lightning_fot.commands.job.classes import check_classes
from lightning_fot.config.attending.renamed import current
from lightning_fot.config.evaluation import EvaluationConfig
from lightning_fot.config.run import LINKS
from lightning_fot.data.datamodule import CrossbatchDataModule
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.request.request import Request
from lightning_fot.training.module import FocusedTransformer

# The job has its own progress, its own evaluation after training, and writes every step's loss.
TRAINER_DEFAULTS: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "logger": False,
    # The data module shards documents by rank itself; Lightning's sampler would shuffle windows.
    "use_distributed_sampler": False,
}


class JobCLI(LightningCLI):
    """LightningCLI with the settings of a job beside trainer, model and data.

    Args:
        arguments: Command line without the verb.
        callbacks: Added to those of the configuration.
        loggers: Added to those of the configuration.
        run_dir: Run folder; Lightning's own files go there too.
    """

    def __init__(
        self, arguments: Sequence[str], callbacks: Sequence[Callback], loggers: Sequence[Logger], run_dir: Path | None
    ) -> None:
        self.job_callbacks = list(callbacks)
        self.job_loggers = list(loggers)
        self.run_dir = run_dir
        # Makes ${model.memory.window} mean the same in a section as in the whole file.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        with warnings.catch_warnings():
            # Meant for scripts that forget that sys.argv exists; here the verb has been taken off it.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            super().__init__(
                FocusedTransformer,
                CrossbatchDataModule,
                run=False,
                save_config_callback=None,
                args=list(arguments),
                seed_everything_default=0,
                trainer_defaults=dict(TRAINER_DEFAULTS),
                auto_configure_optimizers=False,
                # Plain "omegaconf" ignores overrides in interpolations. Abbreviated options would hide typos.
                parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False},
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a job needs besides trainer, model and data."""
        parser.add_argument("--evaluation", type=EvaluationConfig, default=EvaluationConfig())
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder; default runs/<config name>.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to go on from; 'last' is the run folder's."
        )
        for source, target in LINKS.items():
            parser.link_arguments(source, target)

    def before_instantiate_classes(self) -> None:
        """Refuses classes that a configuration may not name."""
        check_classes(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the job's callbacks and loggers to those of the configuration."""
        chosen = self._get(self.config_init, "trainer.logger")
        if self.job_loggers:
            listed = chosen if isinstance(chosen, list) else [chosen] if isinstance(chosen, Logger) else []
            kwargs["logger"] = [*self.job_loggers, *listed]
        if self.run_dir is not None and self._get(self.config_init, "trainer.default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.run_dir)
        settings = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if not self.job_callbacks and not settings.get("callbacks"):
            # Only looking: Lightning would make a folder for a checkpoint that is never written.
            settings["enable_checkpointing"] = False
        return self._instantiate_trainer(settings, list(self.job_callbacks))

    @property
    def evaluation(self) -> EvaluationConfig:
        """The evaluation's settings."""
        given = self.config_init.evaluation
        return given if isinstance(given, EvaluationConfig) else EvaluationConfig(**given.as_dict())

    def config_text(self, **settings: object) -> str:
        """The resolved configuration as YAML, with some top-level settings replaced."""
        config = self.config.clone()
        config.pop("config", None)
        for key, value in settings.items():
            config[key] = value
        if (memory := config.get("model.memory")) is not None:
            # Old words are arguments still; here `attending` says what they say.
            config["model.memory"] = type(memory)(**current(vars(memory)))
        text: str = self.parser.dump(config, skip_none=False)
        return text

    def config_dict(self, **settings: object) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        loaded: dict[str, Any] = yaml.safe_load(self.config_text(**settings))
        return loaded


def quiet() -> None:
    """Silences what users of the command line cannot act on; ``--debug`` leaves it."""
    # "GPU available", tips for other products, the seed: all of it is in results.json.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # One loader process is meant: the documents are tokenised beforehand.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning calls functions of torch that newer versions mark for removal.
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # Backbones are trained with dropout off, as they were loaded.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")


def parse(
    request: Request,
    arguments: Sequence[str],
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    run_dir: Path | None = None,
) -> JobCLI:
    """Parses, checks and instantiates: the trainer, the model without weights, the data module without documents.

    Raises:
        SettingError: A setting is unknown, of the wrong type or out of range.
    """
    try:
        return JobCLI(arguments, callbacks, loggers, run_dir)
    except jsonargparse.ArgumentError as error:
        raise explain(str(error), request) from error
    except (OmegaConfBaseException, MisconfigurationException) as error:
        raise SettingError("config", _files(request), " ".join(str(error).split()), "Correct it.") from error
    except (SettingError, MissingLibraryError):
        raise
    except (TypeError, ValueError) as error:
        # What constructors refuse: Trainer raises ValueError for an unknown accelerator, for example.
        raise _refused(str(error), request) from error


def _unknown(key: str, value: object) -> SettingError:
    return SettingError(key, value, "is not a known setting", "All settings: lightning-fot run --help")


def _refused(message: str, request: Request) -> SettingError:
    """The error for what Trainer refuses; its messages quote the argument as ``name='value'``."""
    problem = " ".join(message.split()).rstrip(".")
    if (match := re.search(r"`(?:Trainer\()?(\w+)=[^`]*`", problem)) and request.get(f"trainer.{match[1]}") is not None:
        key = f"trainer.{match[1]}"
        return SettingError(key, request.get(key), problem, "Correct it.")
    return SettingError("config", _files(request), problem, "Correct it.")


def _files(request: Request) -> str:
    return ", ".join(request.config_words) or "command line"


def explain(message: str, request: Request) -> SettingError:
    """Turns an error of jsonargparse into one that names setting, value and fix."""
    if match := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        key = f"{match[1]}.{match[2]}"
        return _unknown(key, request.get(key))
    if match := re.match(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message):
        return _unknown(match[1], request.get(match[1]))
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        word = match[1].split()[0]
        if not word.startswith("-"):
            return SettingError("arguments", word, "is not understood", "Write settings as --key.sub=value.")
        key, _, value = word.lstrip("-").partition("=")
        return _unknown(key, value or None)
    if match := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        problem = " ".join(match[2].split())
        wanted = re.match(r"Expected an? (.*)\. Got value: (.*)", problem)
        if wanted:
            kind = re.sub(r"<class '(\w+)'>", r"\1", wanted[1])
            return SettingError(match[1], wanted[2], f"must be {kind}", "Correct it.")
        option = re.search(r"Option '(\w+)' is not accepted", problem)
        if option:
            key = f"{match[1]}.init_args.{option[1]}"
            return SettingError(
                key,
                request.get(key),
                f"is not an argument of {request.get(f'{match[1]}.class_path')}",
                "Correct or remove it.",
            )
        return SettingError(match[1], request.get(match[1]), problem.rstrip("."), "Correct it.")
    return SettingError("arguments", _files(request), " ".join(message.split()).rstrip("."), "Correct it.")
