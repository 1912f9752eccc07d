"""``lightning bench --target-recall`` and ``--budget-ms``: settings of each layer, as a table, a YAML and a picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning_fot.config.retriever import RetrieverSpec
from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.system.files import write_json, write_text, writing

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_fot.bench.goals import Choice, Goal


def tune(file: Path, specs: Sequence[RetrieverSpec], k: int, options: SimpleNamespace, program: str) -> int:
    """Runs the command.

    Args:
        file: Recorded keys and queries.
        specs: Retrievers to choose from.
        k: Neighbours wanted.
        options: Those of ``lightning bench``.
        program: How it was called.

    Returns:
        Exit code: 0, or 1 where a layer has no setting that reaches what was asked for.

    Raises:
        SettingError: The file does not fit.
    """
    from rich.console import Console

    from lightning_fot.bench.goals import Goal, layers_of
    from lightning_fot.bench.measure import load_metadata, load_qk
    from lightning_fot.bench.tune import tune_layer
    from lightning_fot.config.retriever import layer_spec
    from lightning_fot.system.progress import JobProgress

    if options.plot is not None:
        _require_matplotlib()
    layers = layers_of(load_qk(file), load_metadata(file))
    nameless = [layer.name for layer in layers if layer.layer is None]
    if options.out is not None and nameless and len(layers) > 1:
        raise SettingError(
            "out", options.out, f"{', '.join(nameless)} name no layers", "Name the arrays L18h0_keys and so on."
        )
    goal = Goal(options.target_recall, options.budget_ms, options.batch[-1])
    choices = []
    with JobProgress(first_speed=None) as progress:  # a unit a layer
        progress.plan([(layer.name, 1.0) for layer in layers])
        for layer in layers:
            progress.start(layer.name)
            own = [layer_spec(spec, layer.layer) for spec in specs]

            def say(what: str) -> None:
                progress.advance(0.0, what)

            choices.append(tune_layer(layer, own, k, goal, options.batch, say))
            progress.finish(layer.name)
    if options.json == "-":
        print(json.dumps([as_dict(choice) for choice in choices], indent=2))
    else:
        console = Console()
        for choice in choices:
            _print(console, choice, goal, k)
    if options.json not in (None, "-"):
        write_json(Path(options.json), [as_dict(choice) for choice in choices])
    if options.plot is not None:
        draw(choices, goal, k, Path(options.plot))
    missing = [choice.layer.name for choice in choices if choice.chosen is None]
    if missing:
        if options.out is not None:
            print(f"{options.out} is not written: nothing was found for {', '.join(missing)}.")
        return 1
    if options.out is not None:
        write_text(Path(options.out), as_yaml(choices, goal, k, file.name, options.out, program))
        print(f"Written to {options.out}. Use it with: {_run(program, options.out)}")
    return 0


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise MissingLibraryError("matplotlib", "pip install matplotlib", "--plot")


def _run(program: str, out: str) -> str:
    return f"{program.removesuffix(' bench')} run --config hnsw --config {shlex.quote(out)}"


def _wish(goal: Goal) -> str:
    if goal.recall is not None:
        return f"recall {goal.recall:.4g} of every head"
    return f"{goal.budget_ms:.4g} ms a call of {goal.batch} queries a head"


def as_dict(choice: Choice) -> dict[str, Any]:
    """A choice as JSON-able data; ``chosen`` is None where nothing meets the goal."""
    from dataclasses import asdict

    return {
        "layer": choice.layer.layer,
        "name": choice.layer.name,
        "chosen": None if choice.chosen is None else choice.spec,
        "heldout": choice.heldout,
        "nearest": asdict(choice.nearest),
        "trials": [asdict(trial) for trial in choice.trials],
    }


def verdict(choice: Choice, goal: Goal) -> list[str]:
    """What was chosen for a layer and what it is worth, in lines of text."""
    from lightning_fot.config.retriever import EXACT

    title = choice.layer.name.capitalize() if choice.layer.layer is not None else choice.layer.name
    if choice.chosen is None:
        near = choice.nearest
        return [
            f"{title}: nothing reaches {_wish(goal)}. The nearest: {near}, "
            f"recall {near.recall:.1%} (worst head {near.worst_recall:.1%}), {near.ms:.3g} ms a call."
        ]
    held = choice.heldout
    calls = ", ".join(f"{call['search_ms_p50']:.3g} ms a call of {call['batch']}" for call in held["calls"])
    lines = [
        f"{title}: {choice.chosen}",
        f"  on {held['queries']:,} held-out queries a head: recall {held['recall']:.1%} (worst head "
        f"{held['worst_recall']:.1%}), mass recall {held['mass_recall']:.1%}, {calls}; "
        f"built in {held['build_s']:.2f} s, {held['bytes'] / 1e6:.1f} MB",
    ]
    exact = next((trial for trial in choice.trials if trial.name == EXACT), None)
    if choice.chosen.name == EXACT:
        lines.append(f"  No index that was tried is better at {_wish(goal)}: exact search is.")
    elif exact is not None:
        lines.append(
            f"  Exact search takes {exact.ms:.3g} ms a call of {goal.batch}, {exact.ms / choice.chosen.ms:.1f} x."
        )
    if goal.recall is not None and held["worst_recall"] < goal.recall:
        lines.append(f"  That is below {goal.recall:.4g} on queries it was not chosen by: record more, or aim higher.")
    return lines


def _print(console: Console, choice: Choice, goal: Goal, k: int) -> None:
    from rich.table import Table

    layer = choice.layer
    title = (
        f"{layer.name}: {layer.keys.shape[1]:,} keys of {len(layer.keys)} KV head{'s' * (len(layer.keys) > 1)}, k = {k}"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column("")
    table.add_column("tried", overflow="fold")
    for heading in ("recall", "worst head", "mass", f"ms a {goal.batch}", "build s", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sorted(choice.trials, key=lambda trial: (_index(trial), trial.recall)):
        table.add_row(
            "*" if trial is choice.chosen else "",
            str(trial),
            f"{trial.recall:.1%}",
            f"{trial.worst_recall:.1%}",
            f"{trial.mass_recall:.1%}",
            f"{trial.ms:.3g}",
            f"{trial.build_s:.2f}",
            f"{trial.bytes / 1e6:.1f}",
        )
    console.print(table)
    for line in verdict(choice, goal):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def as_yaml(choices: Sequence[Choice], goal: Goal, k: int, source: str, out: str, program: str) -> str:
    """The choices as a configuration to lay over another one.

    Args:
        choices: One for each layer, all with something chosen.
        goal: What was asked for.
        k: Neighbours that were wanted.
        source: Name of the recording.
        out: Name of the file, for the command in its first line.
        program: How the command was called.
    """
    import yaml

    lines = [f"# {_run(program, Path(out).name)}", f"# Found on {source} for {_wish(goal)}, k = {k}."]
    for choice in choices:
        lines += [f"# {line.strip()}" for line in verdict(choice, goal)]
    specs = {choice.layer.layer: choice.spec for choice in choices}
    retriever = next(iter(specs.values())) if None in specs else {"layers": specs}
    settings = {"model": {"memory": {"retriever": retriever}}}
    return "\n".join(lines) + "\n" + yaml.safe_dump(settings, sort_keys=False)


def draw(choices: Sequence[Choice], goal: Goal, k: int, path: Path) -> None:
    """Draws recall against time for all settings that were tried, a panel a layer, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(choices), 4.2), layout="constrained")
    panels = figure.subplots(1, len(choices), squeeze=False)[0]
    for panel, choice in zip(panels, choices, strict=True):
        curves: dict[str, list[Any]] = {}
        for trial in choice.trials:
            curves.setdefault(_index(trial), []).append(trial)
        for label, trials in curves.items():
            ordered = sorted(trials, key=lambda trial: trial.ms)
            panel.plot(
                [t.ms for t in ordered], [t.worst_recall for t in ordered], marker="o", markersize=4, label=label
            )
        if choice.chosen is not None:
            panel.plot(choice.chosen.ms, choice.chosen.worst_recall, "k*", markersize=13, label="chosen")
        if goal.recall is not None:
            panel.axhline(goal.recall, color="grey", linewidth=0.8, linestyle="--")
        elif goal.budget_ms is not None:
            panel.axvline(goal.budget_ms, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xscale("log")
        panel.set_title(f"{choice.layer.name}, {choice.layer.keys.shape[1]:,} keys")
        panel.set_xlabel(f"ms a call, {goal.batch} queries a head")
        panel.set_ylabel(f"recall@{k} of the worst head")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    with writing(path) as fresh:
        figure.savefig(fresh, dpi=120, format="png")


def _index(trial: Any) -> str:
    """What the settings of one curve share: all but the argument that was looked for."""
    from lightning_fot.bench.tune import LADDERS

    searched = LADDERS.get(trial.name)
    return " ".join([trial.name, *(f"{name}={value}" for name, value in trial.args.items() if name != searched)])
