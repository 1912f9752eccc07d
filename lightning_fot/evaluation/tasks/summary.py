"""Rows of ``results.json`` from the records of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_fot.config.tasks import DistractionTask, LookupTask, StoryTask
from lightning_fot.evaluation.measures.passkey import wilson
from lightning_fot.evaluation.measures.perplexity import estimate
from lightning_fot.evaluation.tasks.lookup import same_answers

Row = dict[str, Any]


def summarised(
    task: str, length: int, memory: str, record: list[Row], plain: list[Row] | None
) -> tuple[str, list[tuple[Row, list[Row]]]]:
    """Part of the results, and its rows, each with what it sums up; fields as `evaluation.rows.summarise` says.

    Args:
        task: Its name.
        length: As set.
        memory: ``none``, ``exact`` or the retriever's name.
        record: Rows of the phase, at least one.
        plain: Those of the same measurement without a memory, if there are.
    """
    if task == StoryTask.name:
        rows = _story_rows(length, memory, record, plain) + _name_rows(length, memory, record, plain)
        return task, [(row, record) for row in rows]
    if task == DistractionTask.name:
        return task, [(_distraction_row(length, memory, part), [part]) for part in record]
    if task == LookupTask.name:
        return task, [(_lookup_row(length, memory, part), [part]) for part in record]
    return "tasks", [(task_row(task, length, memory, record), record)]


def _lookup_row(length: int, memory: str, part: Row) -> Row:
    """One text asked in one way."""
    row = task_row(LookupTask.name, length, memory, [part])
    # The text was read once, for both ways of asking.
    for field in ("task", "read_tokens_per_s"):
        row.pop(field, None)
    right = [ours == all_of_it for ours, all_of_it in zip(part["right"], part["tokens"], strict=True)]
    return {"asked": part["asked"], **row, **same_answers(part["said"], right)}


def _distraction_row(length: int, memory: str, part: Row) -> Row:
    row: Row = {
        "documents": part["documents"],
        "context_tokens": length,
        "memory": memory,
        "n": len(part["own_share"]),
        "chance": 1 / part["documents"],
    }
    for field in ("own_share", "own_share_found", "memory_mass"):
        row[field], row[f"{field}_standard_error"] = mean_and_error(part[field])
    return row


def _story_rows(length: int, memory: str, record: Sequence[Row], plain: Sequence[Row] | None) -> list[Row]:
    """A row for each window of the continuation; stories are the unit of sampling."""
    rows, distance = [], 0
    for place, (_, tokens) in enumerate(record[0]["windows"]):
        nll, error = mean_and_error([part["windows"][place][0] / tokens for part in record])
        row: Row = {
            "context_tokens": length,
            "memory": memory,
            "distance": distance,
            "tokens": tokens * len(record),
            "stories": len(record),
            "nll": nll,
            "nll_standard_error": error,
        }
        if plain and record is not plain:
            pairs = zip(record, plain, strict=True)
            saved = [(base["windows"][place][0] - part["windows"][place][0]) / tokens for part, base in pairs]
            row["gain_nats"], row["gain_standard_error"] = mean_and_error(saved)
        rows.append(row)
        distance += tokens
    return rows


def _name_rows(length: int, memory: str, record: Sequence[Row], plain: Sequence[Row] | None) -> list[Row]:
    """One row of all far names, if there are any; stories are the unit of sampling, since a story repeats its names."""
    names = [[nats for nats, _ in part["names"]] for part in record]
    if not any(names):
        return []
    nll, error = clustered(names)
    row: Row = {
        "context_tokens": length,
        "memory": memory,
        "names": sum(map(len, names)),
        "nll": nll,
        "nll_standard_error": error,
    }
    if plain and record is not plain:
        base = [[nats for nats, _ in part["names"]] for part in plain]
        saved = [
            [alone - nats for nats, alone in zip(ours, theirs, strict=True)]
            for ours, theirs in zip(names, base, strict=True)
        ]
        row["gain_nats"], row["gain_standard_error"] = clustered(saved)
    return [row]


def task_row(task: str, length: int, memory: str, record: Sequence[Row]) -> Row:
    """Accuracy of one length: see :func:`lightning_fot.evaluation.rows.summarise`.

    Args:
        task: Its name.
        length: As set.
        memory: ``none``, ``exact`` or the retriever's name.
        record: A row for each episode, at least one answer in all.
    """
    right, tokens = ([value for part in record for value in part[field]] for field in ("right", "tokens"))
    n = len(tokens)
    correct = sum(ours == all_of_it for ours, all_of_it in zip(right, tokens, strict=True))
    low, high = wilson(correct, n)
    losses = [[total / count for total, count in zip(part["nats"], part["tokens"], strict=True)] for part in record]
    # Answers about one text are alike. Of a single text nothing tells how texts differ.
    nll, error = clustered(losses if sum(map(bool, losses)) > 1 else [[value] for value in losses[0]])
    row: Row = {
        "task": task,
        "context_tokens": length,
        "memory": memory,
        "accuracy": correct / n,
        "n": n,
        "correct": correct,
        "low": low,
        "high": high,
        "token_accuracy": sum(right) / sum(tokens),
        "nll": nll,
        "nll_standard_error": error,
        "question_ms": 1e3 * sum(part["ask_s"] for part in record) / n,
    }
    if all("bytes" in part for part in record):
        read, seconds = (sum(part[field] for part in record) for field in ("read_tokens", "read_s"))
        row |= {"bytes": max(part["bytes"] for part in record), "read_tokens_per_s": read / max(seconds, 1e-9)}
    if len(record) > 1 and n > len(record):
        whole = sum(part["right"] == part["tokens"] for part in record)
        row |= {"all_correct": whole, "texts": len(record)}
    for field in ("recall", "mass_recall"):
        if values := [part[field] for part in record if field in part]:
            row[field] = sum(values) / len(values)
    return row


def clustered(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean of all values and its standard error, groups being the unit of sampling; None from fewer than two.

    Values of one group (answers about one text, names in one story) are alike: taken for independent, they would give
    too small an error.
    """
    found = estimate([(sum(group), len(group)) for group in groups if group])
    return found.mean, found.standard_error


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None from fewer than two values."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
