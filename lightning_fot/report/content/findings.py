"""What a run found, in plain sentences: each with its caveat, and bad news said as plainly as good news."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_fot.config.evaluation import whole_readings
from lightning_fot.report.content import curves, formats, read


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        topic: What was measured, a few words.
        value: The number to remember.
        text: One or two sentences for a newcomer.
        caveat: What limits the claim.
        verdict: ``good``, ``bad`` or ``open`` (not settled by this run, or nothing to compare with).
    """

    topic: str
    value: str
    text: str
    caveat: str
    verdict: str


def find(results: read.Row) -> list[Finding]:
    """Findings of a run, the most important first; empty when nothing was measured."""
    found = [_perplexity(results), _passkey(results), _retrieval(results), _training(results)]
    return [finding for finding in found if finding is not None]


def missing_parts(results: read.Row) -> list[str]:
    """Parts of an evaluation that these results lack, as words."""
    names = {"perplexity": "perplexity", "tasks": "passkey", "retrieval": "retrieval", "exact": "exact search"}
    return [word for name, word in names.items() if not read.rows(results, name)]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _perplexity(results: read.Row) -> Finding | None:
    table = read.by_context(read.rows(results, "perplexity"), "value")
    name = read.retriever_name(results)
    kind = next((kind for kind in (name, "exact", *whole_readings(), "none") if table.get(kind)), None)
    if kind is None:
        return None
    context, row = max(table[kind].items())
    value = float(row["value"])
    shown = formats.fixed(value)
    base_row = table.get("none", {}).get(context)
    if kind == "none" or base_row is None:
        with_memory = "without a memory" if kind == "none" else f"with {_context(kind, context)}"
        text = f"Perplexity on held-out text is {shown} {with_memory}."
        caveat = "With a memory it was not measured." if kind == "none" else "Without a memory it was not measured."
        return Finding("Perplexity", shown, text, caveat, "open")
    base = float(base_row["value"])
    change = value / base - 1
    no_change = formats.fixed(base) == shown
    memory = _context(kind, context)
    if no_change:
        text = f"With {memory} the model predicts held-out text as well as without: no change."
    else:
        direction, meaning = ("lower", "better") if change < 0 else ("higher", "worse")
        text = (
            f"With {memory}, perplexity on held-out text is {formats.percent(abs(change))} {direction} than without: "
        )
        text += f"the model predicts the text {meaning}."
    if kind not in whole_readings():
        text += _beside_exact(table, kind, context, row)
    caveat, settled = _perplexity_caveat(row, base_row)
    verdict = "open" if no_change or not settled else "good" if change < 0 else "bad"
    topic = f"Perplexity with {formats.tokens(context)} tokens of {'context' if kind in whole_readings() else 'memory'}"
    return Finding(topic, f"{formats.fixed(base)} → {shown}", text, caveat, verdict)


def _context(kind: str, tokens: int) -> str:
    """What was read before the scored text, in words."""
    what = "a context" if kind in whole_readings() else "a memory"
    return f"{what} of {formats.tokens(tokens)} tokens ({curves.memory_name(kind)})"


def _beside_exact(table: dict[str, dict[int, read.Row]], kind: str, context: int, row: read.Row) -> str:
    exact = read.number(table.get("exact", {}).get(context, {}), "value")
    if kind == "exact":
        return ""
    if not read.index_used(row):
        return f" The memory was too small for the {kind} index, so this is exact search."
    if exact is None:
        return ""
    gap = float(row["value"]) / exact - 1
    if abs(gap) < 0.0005:
        return f" Exact search gives {formats.fixed(exact)}: the index costs nothing."
    verb = "the index costs" if gap > 0 else "the index is lower by"
    return f" Exact search gives {formats.fixed(exact)}: {verb} {formats.percent(gap if gap > 0 else -gap)}."


def _perplexity_caveat(row: read.Row, base_row: read.Row) -> tuple[str, bool]:
    """The caveat, and whether the change is more than twice its standard error."""
    n = read.number(row, "tokens", "n")
    scored = f"{formats.tokens(n)} tokens scored" if n else "Tokens scored were not recorded"
    documents = read.number(row, "documents")
    if documents:
        scored += f" in {documents:.0f} document{'' if documents == 1 else 's'}"
    change = paired_change(row)
    if change is not None and change[1] is not None:
        settled = abs(change[0]) > 2 * change[1]
        over = f"one standard error {curves.SAMPLED}"
        text = f"{scored}; on these same tokens the change is {formats.change(*change)} ({over})."
        return text if settled else f"{text} That is too close to zero to be sure of.", settled
    errors = [error for error in (read.standard_error(row), read.standard_error(base_row)) if error is not None]
    if not errors:
        return f"{scored}, without a standard error: chance is not ruled out.", False
    text = f"{scored}; standard error of each number up to ±{formats.fixed(max(errors))}."
    settled = abs(float(row["value"]) - float(base_row["value"])) > 2 * math.hypot(*errors)
    # The same tokens are scored each time, so the difference varies less than either number: no reason to dismiss it.
    return text if settled else f"{text} The change is small beside that: one run does not settle it.", settled


def paired_change(row: read.Row) -> tuple[float, float | None] | None:
    """Relative change of perplexity against no memory and its standard error, from the gain on the same tokens."""
    gain, error = read.number(row, "gain_nats"), read.number(row, "gain_standard_error")
    if gain is None:
        return None
    ratio = math.exp(-gain)
    return ratio - 1, None if error is None else ratio * error


def _passkey(results: read.Row) -> Finding | None:
    tasks = [row for row in read.rows(results, "tasks") if row.get("task", "passkey") == "passkey"]
    table = read.by_context(tasks, "accuracy")
    kind = next((kind for kind in (read.retriever_name(results), "exact", *table) if table.get(kind)), None)
    if kind is None:
        return None
    context, row = max(table[kind].items())
    accuracy = float(row["accuracy"])
    memory = {"none": "no memory", "exact": "exact memory search"}.get(kind, f"a memory searched by {kind}")
    text = f"Asked for a number hidden in {formats.tokens(context)} tokens of filler, the model with {memory} "
    text += f"gave it in {_count(row)} tries" if read.number(row, "n") else f"gave it {_count(row)} of the time"
    compared = [(other, table.get(other, {}).get(context)) for other in ("exact", "none") if other != kind]
    beside = [f"{curves.memory_name(other)}: {_count(found)}" for other, found in compared if found is not None]
    text += f" ({'; '.join(beside)})." if beside else "."
    if accuracy == 0:
        text += " It does not find the number."
    n = read.number(row, "n")
    caveat = "The number of prompts was not recorded."
    if n:
        low, high = formats.wilson_interval(accuracy * n, n)
        few = " are few" if n < 50 else ""
        caveat = f"{n:.0f} prompts{few}: the true rate lies between {low:.0%} and {high:.0%} (95% interval)."
    verdict = "bad" if accuracy == 0 else _against(row, table.get("none", {}).get(context))
    return Finding(f"Passkey at {formats.tokens(context)} tokens", _count(row), text, caveat, verdict)


def _count(row: read.Row) -> str:
    accuracy, n = read.number(row, "accuracy"), read.number(row, "n")
    return f"{round((accuracy or 0) * n)} of {n:.0f}" if n else formats.percent(accuracy, 0)


def _against(row: read.Row, plain: read.Row | None) -> str:
    """Better or worse than without memory only where the 95 % intervals are apart."""
    intervals = []
    for measured in (row, plain or {}):
        accuracy, n = read.number(measured, "accuracy"), read.number(measured, "n")
        if accuracy is None or not n:
            return "open"
        intervals.append(formats.wilson_interval(accuracy * n, n))
    (low, high), (plain_low, plain_high) = intervals
    return "good" if low > plain_high else "bad" if high < plain_low else "open"


def _retrieval(results: read.Row) -> Finding | None:
    chosen = read.configured_rows(results)
    recall = mean(read.number(row, "recall") for row in chosen)
    if recall is None:
        return None
    name = read.retriever_name(results)
    k = read.number(chosen[0], "k")
    best = "best keys" if k is None else f"{k:.0f} best keys"
    topic = "Recall and speed" if k is None else f"Recall@{k:.0f} and speed"
    size = read.number(chosen[0], "memory_tokens")
    caveat = f"Measured on {formats.tokens(size)} keys a head with this run's own queries." if size else ""
    if name == "exact":
        text = "This run searches exactly, so it finds every key; there is no index to compare."
        return Finding("Retrieval", formats.percent(recall), text, caveat, "open")
    mass = mean(read.number(exact, "mass") for row in chosen if (exact := read.exact_row(results, row)) is not None)
    if mass is not None and mass < 0.9:
        caveat += f" Even the exact {best} hold only {formats.percent(mass)} of all attention on the memory."
    if not read.configured_is_certain(results):
        caveat += " The results do not say which query setting the run used; this is the middle of those measured."
    if not all(read.index_used(row) for row in chosen):
        text = f"The memory was too small for the {name} index, so it was searched exactly: the recall of "
        text += f"{formats.percent(recall)} says nothing about {name}."
        return Finding(topic, "index not used", text, caveat.strip(), "open")
    label = read.setting(chosen[0], read.varying_arguments(read.rows(results, "retrieval")))
    text = f"{name}{f' at {label}' if label else ''} finds {formats.percent(recall)} of the {best}"
    text += " on average over the memory layers" if len(chosen) > 1 else ""
    mass_recall = mean(read.number(row, "mass_recall") for row in chosen)
    if mass_recall is not None:
        text += f"; those found carry {formats.percent(mass_recall)} of the attention that all of them would get"
    # The geometric mean: twice as fast on one layer and half as fast on another is no gain.
    ratios = [math.log(ratio) for row in chosen if (ratio := read.speed_ratio(results, row))]
    ratio = math.exp(sum(ratios) / len(ratios)) if ratios else None
    sentence, verdict = _speed(ratio)
    value = formats.percent(recall)
    if ratio is not None and 0.95 < ratio < 1.05:
        value += ", as fast as exact"
    elif ratio is not None:
        value += f" at {formats.times(ratio)} speed" if ratio >= 1 else f", {formats.times(1 / ratio)} slower"
    return Finding(topic, value, f"{text}.{sentence}", caveat.strip(), verdict)


def _speed(ratio: float | None) -> tuple[str, str]:
    if ratio is None:
        return "", "open"
    if ratio >= 1.05:
        return f" A search is {formats.times(ratio)} as fast as exact search in the same run.", "good"
    if ratio > 0.95:
        return " A search takes as long as exact search in the same run.", "open"
    slower = f" A search takes {formats.times(1 / ratio)} as long as exact search in the same run:"
    return f"{slower} here the index does not pay.", "bad"


def _training(results: read.Row) -> Finding | None:
    training = read.section(results, "training")
    steps = read.number(training, "steps")
    if steps is None:
        return None
    if steps == 0:
        text = "The model was not trained in this run: every number is that of the weights as they were loaded."
        return Finding("Training", "none", text, "Set trainer.max_steps above 0 to train.", "open")
    first, last = read.number(training, "loss_first"), read.number(training, "loss_last")
    seen, speed = read.number(training, "tokens"), read.number(training, "tokens_per_s")
    text = f"Crossbatch training ran {formats.tokens(steps)} step{'' if steps == 1 else 's'}"
    text += f" on {formats.tokens(seen)} tokens" if seen else ""
    text += f" at {formats.significant(speed)} tokens/s." if speed else "."
    if first is None or last is None:
        return Finding("Training", f"{formats.tokens(steps)} steps", text, "No loss was recorded.", "open")
    text += " The loss fell." if last < first else " The loss did not fall."
    caveat = "First and last values are of different text, so part of the change is chance."
    # Never "good": a falling loss is no result, what it does to perplexity and passkey is.
    verdict = "open" if last < first else "bad"
    return Finding("Training loss", f"{formats.fixed(first)} → {formats.fixed(last)}", text, caveat, verdict)
