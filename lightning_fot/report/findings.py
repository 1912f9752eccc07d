"""What a run found, in plain sentences: each with its caveat, and bad news said as plainly as good news."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_fot.report import formats, read


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        topic: What was measured, a few words.
        value: The number to remember.
        text: One or two sentences for a newcomer.
        caveat: What limits the claim.
        verdict: ``good``, ``bad`` or ``open`` (not settled by this run, or no comparison).
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


def _perplexity(results: read.Row) -> Finding | None:
    table = read.by_context(read.rows(results, "perplexity"), "value")
    name = read.retriever_name(results)
    plain = table.get("none", {})
    kind = name if table.get(name) else "exact"
    with_memory = table.get(kind, {})
    if not with_memory and not plain:
        return None
    if not with_memory:
        context, row = max(plain.items())
        value = formats.fixed(read.number(row, "value"))
        return Finding("Perplexity", value, f"Without a memory, perplexity on held-out text is {value}.",
                       "With a memory it was not measured.", "open")  # fmt: skip
    context, row = max(with_memory.items())
    value = read.number(row, "value") or math.nan
    topic = f"Perplexity with {formats.tokens(context)} tokens of memory"
    base_row = plain.get(context)
    base = read.number(base_row, "value") if base_row else None
    if base_row is None or not base:
        return Finding(topic, formats.fixed(value), f"Perplexity on held-out text is {formats.fixed(value)}.",
                       "Without a memory it was not measured at this length.", "open")  # fmt: skip
    change = value / base - 1
    shown = f"{formats.fixed(base)} → {formats.fixed(value)}"
    memory = "exact search" if kind == "exact" else kind
    if formats.fixed(base) == formats.fixed(value):
        text = f"A memory of {formats.tokens(context)} tokens ({memory}) changed nothing: the model predicts held-out "
        text += f"text as well with it as without ({formats.fixed(value)})."
    else:
        direction, meaning = ("lower", "better") if change < 0 else ("higher", "worse")
        text = f"With a memory of {formats.tokens(context)} tokens ({memory}), perplexity on held-out text is "
        text += f"{abs(change):.1%} {direction} than without: the model predicts the text {meaning}."
    exact = read.number(table.get("exact", {}).get(context, {}), "value")
    if kind != "exact" and not read.index_used(row):
        text += f" The memory was too small for the {kind} index, so this is exact search."
    elif exact is not None and kind != "exact":
        gap = value / exact - 1
        same = abs(gap) < 0.0005
        text += (
            f" Exact search gives {formats.fixed(exact)}, the same within 0.05 %."
            if same
            else f" Exact search gives {formats.fixed(exact)}: the index {'costs' if gap > 0 else 'differs by'} {abs(gap):.1%}."
        )
    caveat, settled = _perplexity_caveat(row, base_row, value - base)
    verdict = "open" if not settled or formats.fixed(base) == formats.fixed(value) else "good" if change < 0 else "bad"
    return Finding(topic, shown, text, caveat, verdict)


def _perplexity_caveat(row: read.Row, base_row: read.Row, difference: float) -> tuple[str, bool]:
    n = read.number(row, "tokens", "n")
    scored = f"{formats.tokens(n)} tokens scored" if n else "Tokens scored were not recorded"
    documents = read.number(row, "documents")
    if documents:
        scored += f" in {documents:.0f} document{'s' if documents != 1 else ''}"
    change = paired_change(row)
    if change is not None and change[1] is not None:
        settled = abs(change[0]) > 2 * change[1]
        text = f"{scored}; on these same tokens the change is {formats.change(*change)} (one standard error)."
        return text if settled else text + " That is too close to zero to be sure of.", settled
    errors = [error for error in (read.standard_error(row), read.standard_error(base_row)) if error is not None]
    if not errors:
        return f"{scored}; no standard error was recorded.", True
    error = max(errors)
    text = f"{scored}; standard error of each number up to ±{formats.fixed(error)}."
    if abs(difference) < 2 * math.hypot(*errors):
        # The same tokens are scored each time, so the difference varies less than either number: do not dismiss it.
        text += " The change is small beside that; the same tokens are scored both times, which helps, but one run does"
        text += " not settle it."
        return text, False
    return text, True


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
    if not table:
        return None
    name = read.retriever_name(results)
    kind = next((kind for kind in (name, "exact", *table) if table.get(kind)), None)
    if kind is None:
        return None
    context, row = max(table[kind].items())
    accuracy = read.number(row, "accuracy") or 0.0
    n = read.number(row, "n")
    count = f"{round(accuracy * n)} of {n:.0f}" if n else formats.percent(accuracy, 0)
    memory = {"none": "no memory", "exact": "exact search"}.get(kind, f"{kind} memory")
    text = f"Asked for a number hidden in {formats.tokens(context)} tokens of filler, the model with {memory} "
    text += f"answered rightly {count} times" if n else f"was right {count} of the time"
    others = []
    for other, label in (("exact", "exact search"), ("none", "no memory")):
        compared = table.get(other, {}).get(context)
        if other != kind and compared is not None:
            others.append(f"{label}: {_count(compared)}")
    text += f" ({'; '.join(others)})." if others else "."
    plain = table.get("none", {}).get(context)
    base = read.number(plain, "accuracy") if plain else None
    if accuracy == 0:
        text += " It does not find the number."
    caveat = "The number of prompts was not recorded."
    if n:
        low, high = formats.wilson_interval(accuracy * n, n)
        caveat = f"{n:.0f} prompts are few: the true rate lies between {low:.0%} and {high:.0%} (95 % interval)."
        if n >= 50:
            caveat = f"{n:.0f} prompts; 95 % interval {low:.0%} to {high:.0%}."
    if accuracy == 0:
        verdict = "bad"
    else:
        verdict = "open" if base is None or base == accuracy else "good" if accuracy > base else "bad"
    return Finding(f"Passkey at {formats.tokens(context)} tokens", count, text, caveat, verdict)


def _count(row: read.Row) -> str:
    accuracy, n = read.number(row, "accuracy"), read.number(row, "n")
    return f"{round((accuracy or 0) * n)} of {n:.0f}" if n else formats.percent(accuracy, 0)


def mean(values: list[float | None]) -> float | None:
    """Mean of the numbers that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _retrieval(results: read.Row) -> Finding | None:
    chosen = read.configured_rows(results)
    recall = mean([read.number(row, "recall") for row in chosen])
    if recall is None:
        return None
    name = read.retriever_name(results)
    # The geometric mean: twice as fast on one layer and half as fast on another is no gain.
    ratios = [ratio for row in chosen if (ratio := read.speed_ratio(results, row))]
    ratio = math.exp(sum(math.log(value) for value in ratios) / len(ratios)) if ratios else None
    mass_recall = mean([read.number(row, "mass_recall") for row in chosen])
    k = read.number(chosen[0], "k")
    stored = read.number(chosen[0], "memory_tokens")
    where = f"one of {len(chosen)} memory layers" if len(chosen) > 1 else "the memory layer"
    average = "on average over the memory layers" if len(chosen) > 1 else f"in {where}"
    label = read.setting(chosen[0], read.varying_arguments(read.rows(results, "retrieval")))
    at = f" at {label}" if label else ""
    if name == "exact":
        text = "This run searches exactly, so it finds every key."
        return Finding("Retrieval", formats.percent(recall), text, _memory_size(stored), "open")
    text = f"{name}{at} finds {formats.percent(recall)} of the {_whole(k)} best keys, {average}"
    text += f"; they carry {formats.percent(mass_recall)} of the attention that exact search would give." if mass_recall else "."
    verdict = "open"
    if not all(read.index_used(row) for row in chosen):
        text = f"The memory was too small for the {name} index, so it was searched exactly: recall is "
        text += f"{formats.percent(recall)} and says nothing about {name}."
    elif ratio is not None:
        if ratio >= 1.05:
            text += f" A search is {formats.times(ratio)} as fast as exact search in the same run."
            verdict = "good"
        elif ratio > 0.95:
            text += " A search takes as long as exact search in the same run."
        else:
            text += f" A search is {formats.times(1 / ratio)} slower than exact search in the same run: at this size the "
            text += "index does not pay."
            verdict = "bad"
    caveat = _memory_size(stored)
    mass = mean([read.number(exact, "mass") for row in chosen if (exact := read.exact_row(results, row)) is not None])
    if mass is not None:
        caveat += f" Even the exact best {_whole(k)} hold only {formats.percent(mass)} of all attention on the memory." * (
            mass < 0.9
        )
    if not read.configured_is_certain(results):
        caveat += " The results do not say which query setting the run used; this is the middle of those measured."
    value = formats.percent(recall) + (f" at {formats.times(ratio)} speed" if ratio is not None else "")
    return Finding(f"Recall@{_whole(k)} and speed", value, text, caveat.strip(), verdict)


def _memory_size(stored: float | None) -> str:
    return f"Measured on {formats.tokens(stored)} keys a head with this run's own queries." if stored else ""


def _whole(value: float | None) -> str:
    return "k" if value is None else f"{value:.0f}"


def _training(results: read.Row) -> Finding | None:
    training = read.section(results, "training")
    steps = read.number(training, "steps")
    if not training or steps is None:
        return None
    if steps == 0:
        text = "The model was not trained in this run: every number is that of the weights as they were loaded."
        return Finding("Training", "none", text, "Set --trainer.max_steps above 0 to train.", "open")
    first, last = read.number(training, "loss_first"), read.number(training, "loss_last")
    seen = read.number(training, "tokens")
    text = f"Crossbatch training ran {formats.tokens(steps)} steps"
    text += f" on {formats.tokens(seen)} tokens" if seen else ""
    speed = read.number(training, "tokens_per_s")
    text += f" at {formats.significant(speed)} tokens/s." if speed else "."
    if first is None or last is None:
        return Finding("Training", f"{formats.tokens(steps)} steps", text, "No loss was recorded.", "open")
    text += " The loss fell." if last < first else " The loss did not fall."
    caveat = "First and last values are of single batches or short averages, which differ by their text too."
    verdict = "good" if last < first else "bad"
    return Finding("Training loss", f"{formats.fixed(first)} → {formats.fixed(last)}", text, caveat, verdict)
