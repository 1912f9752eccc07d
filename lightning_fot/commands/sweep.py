"""``lightning sweep``: many retrievers, settings, sizes and trainings; finished cells are kept and skipped."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning_fot.errors import SettingError
from lightning_fot.request.request import CONFIG, SHIPPED, Request, make_request
from lightning_fot.request.words import Option, Verb, read
from lightning_fot.sweep.doing.cell import Here
from lightning_fot.sweep.doing.flow import Flow, Unit
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.sweep.grid import Build, combinations, digest, label_of
from lightning_fot.sweep.runs import RunCell, run_cells, with_settings
from lightning_fot.sweep.search import JOURNAL, Search, index_measures
from lightning_fot.sweep.settings import SweepConfig

if TYPE_CHECKING:
    from lightning_fot.sweep.doing.tasks import Tasks
    from lightning_fot.sweep.measure import IndexCell, Recorded
    from lightning_fot.system.progress import JobProgress
    from lightning_fot.system.signals import StopGuard

ROOT = Path("sweeps")
VERB = Verb(
    "lightning sweep",
    (CONFIG, Option("plan", kind=None, default=False), Option("json", kind=None, default=False)),
    settings=("",),
)
HELP = """\
Usage: {program} --config NAME|FILE [--run_dir FOLDER] [--plan] [--json] [--key.sub=value …]

Measures every cell of the grid in the configuration's section sweep: retrievers on recorded keys and queries of the
model, and whole runs; with a section sweep.search, Optuna tries settings in place of a grid. Shipped: {shipped}.

  --run_dir FOLDER  where cells and results go (default: sweeps/NAME); the same folder again goes on: finished cells
                    are kept and skipped, also after a kill, and several processes may share one
  --plan            print the cells and whether they are done, and do nothing
  --sweep.workers=N  so many cells at once, as tasks of a Ray cluster: docs/scale.md (extra ray)
  --json            print the results as JSON instead of tables
  --key.sub=value   as in run, and --sweep.tokens=8192, --sweep.memory_tokens=[8192]"""


def sweep(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``sweep``.
        program: How it was called.
        debug: Show tracebacks of failed cells, and leave the libraries' log lines on.

    Returns:
        Exit code: 0; 1 when a cell failed; 130 and 143 when stopped by a signal.

    Raises:
        SettingError: A setting cannot work: said before anything is measured.
        MissingLibraryError: The library of a retriever is not installed.
    """
    given = read(words, replace(VERB, program=program))
    if given.help:
        shipped = ", ".join(sorted(f"sweeps/{path.stem}" for path in (SHIPPED / "sweeps").glob("*.yaml")))
        print(HELP.format(program=program, shipped=shipped))
        return 0
    options = given.options
    options.debug = debug
    request = make_request("sweep", options.config, given.settings, program)
    if not request.configs:
        raise SettingError(
            "config", None, "sweep needs a configuration", f"Write: {program} --config configs/sweeps/index_types.yaml"
        )
    given = request.get("run_dir")
    folder = SweepFolder(Path(str(given)).expanduser() if given is not None else ROOT / request.name)
    job = _Sweep(request, SweepConfig.of(request.get("sweep")), folder, options)
    job.check()
    for note in request.notes:
        print(note, file=sys.stderr)
    return job.plan() if options.plan else job.run()


def _is_whole(recording: Path) -> bool:
    """Whether a recording is there, and is what was written under this name."""
    if not recording.is_file():
        return False
    from lightning_fot.bench.measure import load_metadata
    from lightning_fot.system.tensor_files import load_tensors

    try:
        load_tensors(recording)
        return bool(load_metadata(recording).get("file", recording.name) == recording.name)
    except (OSError, ValueError):
        return False


class _Sweep:
    """One call of the command.

    Args:
        request: The command line.
        config: The section ``sweep``.
        folder: Where cells go.
        options: ``plan``, ``json``, ``debug``.
    """

    def __init__(self, request: Request, config: SweepConfig, folder: SweepFolder, options: SimpleNamespace) -> None:
        self.request = request
        self.config = config
        self.folder = folder
        self.options = options
        self.searched = config.search_config()
        trains = config.runs or (self.searched is not None and self.searched.runs)
        own = {"sweep", "run_dir", "ckpt_path"} if trains else {"sweep", "run_dir"}
        self.settings = {key: value for key, value in request.settings.items() if key not in own}
        self.builds: list[Build] = config.builds()
        self.workers = config.tasks()
        self.layers: list[Recorded] = []
        self.search: Search | None = None
        self.failures: dict[str, str] = {}
        self.busy: list[str] = []
        self.progress: JobProgress | None = None

    def check(self) -> None:
        """Finds what cannot work before anything is measured."""
        from lightning_fot.request.preflight import check_settings

        runs = list(combinations(self.config.runs)) if self.config.runs else []
        for change in [*self._recordings(), *runs, *(self.searched.corners() if self.searched else [])]:
            changed = with_settings(self.settings, change)
            check_settings(Request("run", self.request.configs, [], changed, program=self.request.program))

    def _recordings(self) -> list[dict[str, Any]]:
        """Combinations of model settings that are recorded; none where keys are given or no index is measured."""
        if self.config.keys is not None or not self.builds:
            return []
        return list(combinations(self.config.recordings))

    def _runs(self) -> list[RunCell]:
        return run_cells(self.config.runs, self.settings, self.folder.runs.resolve())

    def plan(self) -> int:
        """Prints the cells, which of them are done, and how long the others may take."""
        from lightning_fot.sweep.estimate import Spent

        made = [change for change in self._recordings() if _is_whole(self._recording(change))]
        for change in self._recordings():
            state = "done" if change in made else "to do"
            print(f"{state:5}  recording of {self.config.tokens:,} tokens {label_of(change)}".rstrip())
        spent = Spent()
        if self.builds and len(made) == len(self._recordings()):
            for cell in self._index_cells():
                known = self.folder.read(cell.key)
                missing, all_of_it = len(cell.missing(known)), len(cell.missing(None))
                spent.add(str(cell.build.spec["name"]), cell.cost, missing / all_of_it, (known or {}).get("seconds"))
                state = "to do" if missing else "done"
                print(f"{state:5}  {cell.label}: {missing or all_of_it} settings")
        elif self.builds:
            sizes = ", ".join(f"{size:,}" for size in self.config.memory_tokens or [self.config.tokens])
            for build in self.builds:
                settings = len(build.query) * len(self.config.top_k) * len(self.config.batch)
                print(f"to do  {build.label}: {settings} settings, for each layer and size of {sizes} keys")
            spent.unknown = True
        for run in self._runs():
            row = next(iter((self.folder.read(run.key) or {}).get("rows", [])), None)
            spent.add("run", 1.0, float(row is None), (row or {}).get("seconds"))
            print(f"{'to do' if row is None else 'done':5}  {run.label}")
        if self.searched is not None:
            readable = bool(self.layers) or not self.searched.retrievers
            begun = readable and (self.searched.storage is not None or (self.folder.path / JOURNAL).is_file())
            ended = self._open_search().ended if begun else 0
            print(f"search: {ended} of {self.searched.trials} trials done")
        print(spent)
        return 0

    def run(self) -> int:
        """Does what is not done yet."""
        import yaml

        from lightning_fot.pretrained.quiet import quietly
        from lightning_fot.system.files import write_text
        from lightning_fot.system.progress import JobProgress
        from lightning_fot.system.signals import StopGuard, Stopped

        tasks = self._open_tasks()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({**self.settings, "sweep": vars(self.config)}, sort_keys=False)
        write_text(self.folder.config, f"# {self.request.program} --config {self.folder.config}\n{text}")
        if tasks is not None:
            tasks.greet(self.folder.config)
        cells: list[IndexCell] = []
        code = 0
        # Other commands that this one calls print: standard output is for the results alone.
        with contextlib.redirect_stdout(sys.stderr):
            stopped = self._record()
            with quietly(self.options.debug), JobProgress() as progress, StopGuard(progress.message) as guard:
                try:
                    if stopped is not None:
                        return stopped
                    cells = self._index_cells()
                    open_cells = sum(bool(cell.missing(self.folder.read(cell.key))) for cell in cells)
                    if cells:
                        progress.message(
                            f"{len(cells)} index cells: {len(cells) - open_cells} done, {open_cells} to do."
                        )
                    self._do(cells, tasks, progress, guard)
                except (Stopped, KeyboardInterrupt) as stop:
                    code = stop.exit_code if isinstance(stop, Stopped) else 130
        self._finish(cells, code)
        return code or int(bool(self.failures))

    def _open_tasks(self) -> Tasks | None:
        """The cluster that does the cells, joined; None where they are done here."""
        if self.workers is None:
            return None
        from lightning_fot.sweep.doing.tasks import Tasks

        return Tasks(self.workers, self.folder)

    def _do(self, cells: Sequence[IndexCell], tasks: Tasks | None, progress: JobProgress, guard: StopGuard) -> None:
        """Does all cells, and then what the search draws until it has its trials."""
        place = tasks or Here(self.folder, guard.check)
        progress.beside, self.progress = place.count, progress
        flow = Flow(self.folder, place, progress, guard.check, self.failures, self.busy, self.options.debug)
        for some in (cells, self._runs()):
            todo = [cell for cell in some if not cell.is_done(self.folder.read(cell.key))]
            progress.plan([(cell.label, cell.cost) for cell in todo])
            flow.do(partial(next, iter([Unit([cell]) for cell in todo]), None))
        if self.searched is not None:
            self.search = self._open_search()
            flow.do(self._trial)

    def _recording(self, change: dict[str, Any]) -> Path:
        model = with_settings(self.settings, change)
        asked = [model.get("model"), model.get("data"), model.get("ckpt_path")]
        wanted = [self.config.tokens, self.config.queries, self.config.past]
        return self.folder.recordings / f"{digest([asked, wanted])}.safetensors"

    def _record(self) -> int | None:
        """Records what is missing; an exit code where that was stopped."""
        import yaml

        from lightning_fot.sweep.recording import record
        from lightning_fot.system.files import publish, workspace, write_text

        for change in self._recordings():
            target = self._recording(change)
            if _is_whole(target):
                continue
            self._drop_altered(target)
            config = target.with_suffix(".yaml")
            write_text(config, yaml.safe_dump(with_settings(self.settings, change), sort_keys=False))
            with self._claimed(target) as ours, workspace(target) as place:
                if not ours:
                    continue
                part = place / target.name
                wanted = (self.config.tokens, self.config.past, self.config.queries)
                print(f"Recording keys and queries {label_of(change)}".rstrip(), file=sys.stderr)
                code = record(part, str(config), [], *wanted, program=self.request.program)
                if code:
                    # What was stopped half-way is no recording.
                    return code
                publish(part, target)
        return None

    def _drop_altered(self, target: Path) -> None:
        """Removes a recording that is not what was written: it is made again."""
        with self.folder.claim(target.stem) as ours:
            if ours and target.is_file() and not _is_whole(target):
                print(f"{target} is not what was written: recording it again.", file=sys.stderr)
                target.unlink()

    @contextlib.contextmanager
    def _claimed(self, target: Path) -> Iterator[bool]:
        """True once the recording is ours to make; False once another process has made it."""
        said = False
        while not target.is_file():
            with self.folder.claim(target.stem) as ours:
                if ours:
                    yield not target.is_file()
                    return
            if not said:
                print("Another process is recording: waiting for it.", file=sys.stderr)
                said = True
            time.sleep(1.0)
        yield False

    def _index_cells(self) -> list[IndexCell]:
        if not self.builds:
            return []
        from lightning_fot.sweep.measure import index_cells, read_layers

        if self.layers:
            return index_cells(self.layers, self.builds, self.config)
        files = [(label_of(change), self._recording(change)) for change in self._recordings()]
        if self.config.keys is not None:
            files = [("", Path(self.config.keys).expanduser())]
        self.layers = [layer for name, file in files for layer in read_layers(file, name, self.config.queries)]
        return index_cells(self.layers, self.builds, self.config)

    def _open_search(self) -> Search:
        assert self.searched is not None
        identity: Any = self.settings
        if self.searched.retrievers:
            asked = [self.config.top_k, self.config.batch, self.config.memory_tokens]
            identity = [[layer.identity for layer in self.layers], asked]
        return Search(self.searched, self.folder, identity)

    def _trial(self) -> Unit | None:
        """The next trial of the search; None where all are done, or being done, by us or others who share it."""
        assert self.search is not None
        with ExitStack() as held:
            found = held.enter_context(self.search.next())
            if found is None:
                return None
            trial, drawn = found
            indexes, runs = self._cells_of([drawn])
            return Unit([*indexes, *runs], partial(self._tell, trial, indexes, runs), True, held.pop_all())

    def _tell(self, trial: Any, indexes: Sequence[IndexCell], runs: Sequence[RunCell], error: str | None) -> None:
        """Ends a trial whose cells have ended."""
        assert self.search is not None
        assert self.searched is not None
        assert self.progress is not None
        try:
            if error is not None:
                raise RuntimeError(error)
            measures = self._measures(indexes, runs)
            self.search.tell(trial, measures)
        except (SettingError, RuntimeError) as problem:
            self.search.fail(trial, str(problem))
            self.failures[f"trial {trial.number}"] = str(problem)
            return
        told = ", ".join(f"{name} {measures[name]:.4g}" for name in self.searched.objectives)
        self.progress.message(f"Trial {trial.number} ({self.search.ended} of {self.searched.trials} done): {told}")

    def _measures(self, indexes: Sequence[IndexCell], runs: Sequence[RunCell]) -> dict[str, Any]:
        """What is known of what a trial has tried."""
        if indexes:
            return index_measures([row for cell in indexes for row in cell.wanted(self.folder.read(cell.key))])
        known = self.folder.read(runs[0].key) or {}
        return dict(known["rows"][0])

    def _cells_of(self, drawn: Sequence[Build | dict[str, Any]]) -> tuple[list[IndexCell], list[RunCell]]:
        """The cells of what trials have drawn."""
        from lightning_fot.sweep.measure import index_cells

        builds = [one for one in drawn if isinstance(one, Build)]
        parent = self.folder.runs.resolve()
        runs = [RunCell(one, with_settings(self.settings, one), parent) for one in drawn if not isinstance(one, Build)]
        return index_cells(self.layers, builds, self.config) if builds else [], runs

    def _finish(self, cells: Sequence[IndexCell], code: int) -> None:
        from lightning_fot.sweep.outcome import Outcome

        runs, searched = self._runs(), None
        if self.search is not None:
            searched = self.search.results()
            indexes, more = self._cells_of(self.search.drawn())
            cells, runs = [*cells, *indexes], list({cell.key: cell for cell in (*runs, *more)}.values())
        outcome = Outcome(self.folder, self.settings, self.config, cells, runs, self.failures, searched)
        # One process at a time: the last to end has seen the cells of all.
        with self.folder.turn("outcome"):
            results = outcome.write()
        if self.options.json:
            print(json.dumps(results, indent=2, default=str))
        else:
            outcome.print(results)
        if self.busy:
            print(f"{len(self.busy)} cells are being done by other processes.", file=sys.stderr)
        if code:
            words = [
                *self.request.program.split(),
                "--config",
                str(self.folder.config),
                f"--run_dir={self.folder.path}",
            ]
            print(f"Stopped; finished cells are kept. Go on with:\n  {shlex.join(words)}", file=sys.stderr)
