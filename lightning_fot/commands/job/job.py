"""The main job: fine-tune on crossbatches, evaluate long context, report. Also ``fit``, ``validate`` and ``test``.

By the time this module is imported the light checks are done; what comes next is the complete check of the settings,
then documents, then the model: the cheapest possible failure first.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console

from lightning_fot.commands.job.parsing import JobCLI, parse, quiet
from lightning_fot.config.attending.renamed import as_before, tasks_as_before
from lightning_fot.config.memory import without_later
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.evaluate import evaluate
from lightning_fot.evaluation.measures.passkey import passkey_examples
from lightning_fot.evaluation.plan import (
    SO_FAR,
    fit_to_documents,
    plan,
    select_distractors,
    select_documents,
    tokens_needed,
)
from lightning_fot.evaluation.rows import summarise
from lightning_fot.evaluation.tasks.parts.texts import select_texts
from lightning_fot.evaluation.tasks.registry import make_tasks
from lightning_fot.request.request import Request, flat_settings
from lightning_fot.system.digests import write_sealed
from lightning_fot.system.environment import environment
from lightning_fot.system.files import write_text
from lightning_fot.system.progress import JobProgress, format_seconds
from lightning_fot.system.ranks import rank
from lightning_fot.system.signals import StopGuard, Stopped
from lightning_fot.training.job_callbacks import (
    MODEL_COST,
    MODEL_PHASE,
    TRAIN_COST,
    TRAIN_PHASE,
    LastCheckpoint,
    TrainingProgress,
    TrainingRecord,
)
from lightning_fot.training.opening import FOR_WEIGHTS, check_checkpoint, load_trained, read_checkpoint
from lightning_fot.training.run_folder import RunFolder

DOCUMENTS_PHASE = "documents"
REPORT_PHASE = "report"
# Walking the library's sources, tokenising them, and drawing the figures: in token-passes, like all costs.
DOCUMENTS_COST = 3000.0
REPORT_COST = 2000.0
SCHEMA = 1


class Job:
    """One run: its settings, its folder, and how far it has come.

    Args:
        request: The command line, already checked.
        arguments: What jsonargparse gets.
        folder: Where results go.
        checkpoint: What to go on from.
        progress: Where to show what goes on.
        guard: Catches signals.
        debug: Leave warnings and log lines of the libraries on.
    """

    def __init__(
        self,
        request: Request,
        arguments: list[str],
        folder: RunFolder,
        checkpoint: Path | None,
        progress: JobProgress,
        guard: StopGuard,
        debug: bool,
    ) -> None:
        if not debug:
            quiet()
        self.request = request
        self.folder = folder
        self.checkpoint = checkpoint
        self.progress = progress
        self.record = TrainingRecord()
        logger = CSVLogger(folder.path, name="logs", version=folder.log_version(), flush_logs_every_n_steps=1)
        # The record comes before the checkpoint, whose file holds it.
        callbacks = [self.record, TrainingProgress(progress), LastCheckpoint(folder, guard)]
        self.cli: JobCLI = parse(request, arguments, callbacks, [logger], folder.path)
        self.config = self.cli.config_dict(run_dir=str(folder.path), ckpt_path=None)
        self.evaluation = self.cli.evaluation
        self.records: dict[str, Any] = {}
        self.documents: list[Any] = []
        self.distractors: Any = None
        self.texts: dict[str, Any] = {}

    @property
    def will_train(self) -> bool:
        """Whether there are steps left to train."""
        trainer = self.cli.trainer
        if trainer.max_steps == 0 or trainer.max_epochs == 0:
            return False
        done = self.folder.trained_steps
        return done is None or done < trainer.max_steps

    def start(self, evaluation: bool) -> None:
        """Makes the folder, plans the phases and reads the documents.

        Raises:
            SettingError: No text, or an evaluation of a model that is shared out over processes.
        """
        if evaluation and isinstance(self.cli.trainer.strategy, ModelParallelStrategy):
            raise SettingError(
                "trainer.strategy",
                "ModelParallelStrategy",
                "leaves no process with the whole model, which the evaluation needs",
                "Train with fit; then run with --ckpt_path last on one process, which evaluates.",
            )
        if rank() == 0:
            self._note_changes()
            text = self._header() + self.cli.config_text(run_dir=str(self.folder.path), ckpt_path=None)
            write_text(self.folder.config, text)
        phases = [(DOCUMENTS_PHASE, DOCUMENTS_COST), (MODEL_PHASE, MODEL_COST)]
        if self.will_train and self.cli.trainer.max_steps > 0:
            module, trainer = self.cli.datamodule, self.cli.trainer
            tokens = trainer.max_steps * trainer.accumulate_grad_batches * module.batch_size * module.window
            phases.append((TRAIN_PHASE, TRAIN_COST * tokens))
        if evaluation:
            memory = self.cli.model.memory_config
            phases += [*plan(self.evaluation, memory.retriever, memory.window), (REPORT_PHASE, REPORT_COST)]
        self.progress.plan(phases)
        self.progress.start(DOCUMENTS_PHASE)
        data = self.cli.datamodule
        data.report = self.progress.message
        # Known before fit() begins: how much text the steps will read.
        data.trainer = self.cli.trainer
        data.setup("fit" if self.will_train else None)
        if evaluation:
            self.documents = self._heldout()
            memory = self.cli.model.memory_config
            self.texts = select_texts(
                self.evaluation.tasks, memory.window, data.heldout_documents, data.other_documents
            )
            # Made to be refused now, not after hours of training.
            passkey_examples(self.evaluation, data.tokenizer_object)
            make_tasks(self.evaluation, memory, data.tokenizer_object, self.texts)
            if self.evaluation.distractor_tokens:
                others = data.other_documents(self.evaluation.distractor_paths, "evaluation.distractor_paths")
                self.distractors = select_distractors(others, self.documents, self.evaluation)
        self.progress.finish(DOCUMENTS_PHASE)

    def _header(self) -> str:
        return f"# {self.request.program} --config {self.folder.config}\n"

    def _heldout(self) -> list[Any]:
        data, config = self.cli.datamodule, self.evaluation
        if not config.context_tokens:
            return []
        found = data.heldout_documents(min_tokens=tokens_needed(config), limit=config.documents)
        if found:
            return list(select_documents(found, config))
        found = data.heldout_documents()
        memory = self.cli.model.memory_config
        # A file's contexts are a proposal for documents of any kind; those of the command line are meant.
        if not any(word.startswith("--evaluation.context_tokens") for word in self.request.overrides):
            self.evaluation = fit_to_documents(found, config, memory.window)
        # Refuses documents that are too short even so now, not after training.
        chosen = list(select_documents(found, self.evaluation))
        self.progress.message(
            f"Held-out documents have at most {max(len(document.ids) for document in found)} tokens: perplexity of "
            f"{self.evaluation.target_tokens} tokens at contexts {self.evaluation.context_tokens}, not of "
            f"{config.target_tokens} at {config.context_tokens}."
        )
        self.progress.plan([(name, 0.0) for name, _ in plan(config, memory.retriever, memory.window)])
        self.progress.plan(plan(self.evaluation, memory.retriever, memory.window))
        return chosen

    def _note_changes(self) -> None:
        """Says what differs from the settings that the run began with."""
        if not self.folder.config.is_file():
            return
        import yaml

        before = yaml.safe_load(self.folder.config.read_text(encoding="utf-8")) or {}
        now, was = flat_settings(self.config), flat_settings(before)
        changed = sorted(
            key for key in now if key in was and now[key] != was[key] and key not in ("run_dir", "ckpt_path")
        )
        if changed:
            listed = ", ".join(f"{key} {was[key]!r} → {now[key]!r}" for key in changed[:6])
            self.progress.message(f"Settings changed since this run began: {listed}")

    def train(self) -> None:
        """Trains, or takes the weights of a training that has ended."""
        model, trainer = self.cli.model, self.cli.trainer
        if self.will_train:
            if rank() == 0 and self.folder.training.exists():
                self.progress.message(f"Training goes on after the {self.folder.trained_steps} steps done.")
                self.folder.training.unlink()
            if self.checkpoint is not None:
                check_checkpoint(self.checkpoint)
            path = None if self.checkpoint is None else str(self.checkpoint)
            # Checkpoints hold numbers only: nothing in one can run code when it is loaded.
            trainer.fit(model, datamodule=self.cli.datamodule, ckpt_path=path, weights_only=True)
            if rank() == 0:
                self.folder.write_training(self.record.results())
            return
        self.progress.start(MODEL_PHASE)
        model.configure_model()
        if self.checkpoint is not None:
            load_trained(model, self.checkpoint)
        self.progress.finish(MODEL_PHASE)
        if self.folder.read_training() is None:
            self.folder.write_training(self.record.results())
        elif self.checkpoint is not None:
            self.progress.message(
                f"Training ended after {self.folder.trained_steps} steps: going on with the evaluation."
            )

    def evaluate(self) -> dict[str, Any]:
        """Evaluates; each finished phase is kept on disk, and skipped when the job goes on."""
        fingerprint = self._fingerprint()
        self.records = self.folder.read_partial(fingerprint)
        if self.records:
            self.progress.message(f"{len(self._finished)} phases of the evaluation are already done.")
            self.progress.plan([(name, 0.0) for name in self._finished])
        # Written even when nothing is done yet: an untrained run goes on from here.
        self.folder.write_partial(fingerprint, self.records)

        def keep(name: str, record: Any) -> None:
            self.records[name] = record
            self.records.pop(name + SO_FAR, None)
            self.folder.write_partial(fingerprint, self.records)

        return evaluate(
            self.cli.model.lm,
            self.cli.datamodule.tokenizer_object,
            self.documents,
            self.evaluation,
            self.progress,
            distractors=self.distractors,
            texts=self.texts,
            done=dict(self.records),
            on_result=keep,
            scratch=self.folder.partial.parent / fingerprint,
        )

    @property
    def _finished(self) -> list[str]:
        """Phases of the evaluation that are done."""
        return [name for name in self.records if not name.endswith(SO_FAR)]

    def _fingerprint(self) -> str:
        """What the records of an evaluation depend on."""
        parts = {key: self.config.get(key) for key in ("model", "data", "evaluation", "seed_everything")}
        # In the words of older versions, so that what they have measured is not measured again.
        model = dict(self.config["model"])
        parts["model"] = {**model, "memory": as_before(without_later(model["memory"]))}
        parts["evaluation"] = tasks_as_before(self.config["evaluation"])
        parts["steps"] = (self.folder.read_training() or {}).get("steps")
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def results(self, measured: dict[str, Any], complete: bool) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return {
            "schema": SCHEMA,
            "complete": complete,
            "seconds": self.progress.elapsed,
            "time": self.progress.spent(),
            "config": self.config,
            "environment": environment(),
            "training": self.folder.read_training() or self.record.results(),
            **measured,
        }

    def stopped(self, console: Console) -> None:
        """Says what is kept, and how to go on; what has been measured is in ``results.json`` too."""
        self.progress.close()
        if any((self.folder.path / "logs").glob("version_*/metrics.csv")):
            self.folder.write_metrics()
        if self.records:
            memory = self.cli.model.memory_config
            measured = summarise(self.records, self.evaluation, memory.retriever)
            write_sealed(self.folder.results, self.results(measured, complete=False))
        console.print()
        if not self.folder.resumable:
            console.print("Stopped before anything was done that could be kept. Start again with:", markup=False)
            command = self.request.command()
        else:
            steps = self.folder.trained_steps
            kept = (
                f"{len(self._finished)} finished phases of the evaluation"
                if steps is not None
                else f"the checkpoint {self.folder.last_checkpoint}"
            )
            console.print(f"Stopped. Kept: {kept}. Go on with:", markup=False, highlight=False, soft_wrap=True)
            command = self.request.command(run_dir=str(self.folder.path), ckpt_path="last")
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def run(
    request: Request,
    arguments: list[str],
    folder: RunFolder,
    checkpoint: Path | None,
    *,
    evaluation: bool = True,
    debug: bool = False,
) -> int:
    """Does the main job (``run``), or only its training (``fit``).

    Returns:
        Exit code: 0, or 130 or 143 when stopped by a signal.

    Raises:
        SettingError: Something cannot work.
        MissingLibraryError: A library is missing.
    """
    # Notes and progress to standard error, results to standard output.
    console = Console(file=None, stderr=True, quiet=rank() != 0)
    progress = JobProgress(console)
    with progress, StopGuard(progress.message) as guard:
        job: Job | None = None
        fresh = not folder.used
        try:
            job = Job(request, arguments, folder, checkpoint, progress, guard, debug)
            job.start(evaluation)
            job.train()
            if rank() != 0:
                # One process evaluates and reports; the others have done their part.
                return 0
            folder.write_metrics()
            if evaluation:
                measured = job.evaluate()
                _finish(job, measured)
        except Stopped as stop:
            if rank() != 0:
                return stop.exit_code
            if job is None:
                progress.close()
                console.print(f"Stopped. Start again with:\n  {request.command()}", markup=False, soft_wrap=True)
            else:
                job.stopped(console)
            return stop.exit_code
        except SettingError:
            if fresh and job is not None:
                _remove_if_empty_run(folder)
            raise
    if not evaluation:
        Console().print(f"Trained {folder.trained_steps} steps: {folder.last_checkpoint}", markup=False, soft_wrap=True)
    return 0


def _remove_if_empty_run(folder: RunFolder) -> None:
    """A run that failed before it did anything leaves no folder behind, so that the next one gets its name."""
    if folder.checkpoints.exists() or folder.partial.exists():
        return
    for file in (folder.config,):
        file.unlink(missing_ok=True)
    for path in sorted(folder.path.glob("logs/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in (folder.path / "logs", folder.path):
        if path.is_dir() and not os.listdir(path):
            path.rmdir()


def _finish(job: Job, measured: dict[str, Any]) -> None:
    from lightning_fot.report import print_tables, write_report

    job.progress.start(REPORT_PHASE)
    results = job.results(measured, complete=True)
    write_sealed(job.folder.results, results)
    write_report(results, job.folder.path)
    job.progress.finish(REPORT_PHASE)
    job.progress.close()
    console = Console()
    print_tables(results, console)
    console.print(
        f"Done in {format_seconds(job.progress.elapsed)}. Results: {job.folder.path}  (report.html, results.json, "
        "metrics.csv, recall_vs_speed.png)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def check(request: Request, arguments: list[str], checkpoint: Path | None, *, debug: bool = False) -> int:
    """Runs Lightning's ``validate`` or ``test`` loop over the held-out documents.

    Returns:
        Exit code.

    Raises:
        SettingError: Something cannot work.
    """
    if not debug:
        quiet()
    cli = parse(request, arguments)
    loop = cli.trainer.validate if request.verb == "validate" else cli.trainer.test
    path = None if checkpoint is None else str(checkpoint)
    if checkpoint is not None:
        read_checkpoint(checkpoint, FOR_WEIGHTS, mapped=True)
    found = loop(cli.model, datamodule=cli.datamodule, ckpt_path=path, verbose=False, weights_only=True)
    console = Console(quiet=rank() != 0)
    for name, value in (found[0] if found else {}).items():
        console.print(f"{name}: {value:.4f}", markup=False, highlight=False)
    return 0
