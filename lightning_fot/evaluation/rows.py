"""Rows of ``results.json`` from the records of an evaluation's phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_fot.config.retriever import EXACT, NONE, RetrieverSpec, retriever_label
from lightning_fot.evaluation.measures.passkey import wilson
from lightning_fot.evaluation.measures.perplexity import Estimate, difference, estimate
from lightning_fot.evaluation.plan import Rows, phases
from lightning_fot.evaluation.speed.split import split_rows
from lightning_fot.evaluation.tasks.summary import summarised

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig

# Fifths of the filler: parts of the passkey's heat map.
_DEPTHS = 5


def summarise(records: Mapping[str, Rows], config: EvaluationConfig, retriever: RetrieverSpec) -> dict[str, Any]:
    """Rows of ``results.json`` from the records that there are, complete or not.

    Perplexity rows: ``value`` with ``standard_error`` over blocks of 256 tokens (see
    ``measures.perplexity.estimate``; by the delta method), ``nll`` in nats a token, ``gain_nats`` over no memory on the
    same tokens with its paired standard error, ``tokens`` scored in ``documents``, and the reading speeds. Memory
    ``none`` is each window of the target alone, the same at every context length.

    Task rows: ``accuracy`` over ``n`` prompts with its 95 % Wilson interval ``low`` to ``high``; in ``key_in_window``
    of them the key was told within the local window, where no memory is needed. ``passkey_depths`` has ``accuracy``
    with its interval for each fifth of the filler that the key stands in (``depth``: where that begins). Other tasks
    than the passkey have ``token_accuracy`` and ``nll`` (nats an answer token, mean over answers, with its standard
    error over texts, or over answers where all are about one text), ``question_ms``, and with a memory its ``bytes``,
    ``read_tokens_per_s`` and, where an index was used, ``recall`` and ``mass_recall`` of searches made by the
    questions.

    Where a text has several questions, ``all_correct`` of the ``texts`` had all answers right.

    Story rows: of the window that begins ``distance`` tokens behind the context, ``nll`` over ``stories`` and, with a
    memory, ``gain_nats`` over none on the same tokens, each with its standard error over stories. A row with ``names``
    in place of ``distance`` is of so many names that the shortest context has and the local window so far has not:
    nats a name, standard errors over stories too.

    Distraction rows: for each number of ``documents`` in the memory, mean over ``n`` of them with its standard error:
    ``own_share`` (r_d, where ``chance`` is 1/d), ``own_share_found`` and ``memory_mass``; see
    :func:`~lightning_fot.evaluation.tasks.distraction.shares`.

    Look-up rows: of one text and one way of asking, ``asked`` (``told`` or ``other`` words), what task rows have, and
    ``distinct_wrong``, ``commonest`` and ``commonest_answer``; see
    :func:`~lightning_fot.evaluation.tasks.lookup.same_answers`.

    Multi-document rows: ``context_tokens`` of the document itself and ``distractor_tokens`` of others, ``value`` and
    the like as for perplexity, ``own_share``, and over the same tokens without other documents ``rise_nats`` with
    ``rise_standard_error``.

    Time rows: ``seconds`` of a ``step`` (``reading``, ``scoring``, ``asking``, ``decoding``) of a ``task`` over its
    ``tokens``, and what they went into: ``model_s``, ``search_s``, ``insert_s``, ``build_s``; ``beside_s`` is building
    in another thread (``speed.split.Split``). Decoding rows: ``ms_p50`` of a token beside
    ``memory_tokens``. They and the retrieval rows have the machine's bound beside them: ``limit_ms``, ``limit_by``
    (``bandwidth`` or ``products``) of ``limit_amount`` (bytes, operations) at ``limit_rate``, and ``of_limit``, how
    much of it is reached.

    Args:
        records: Phase name to record.
        config: The settings of the evaluation.
        retriever: The configured retriever's specification.
    """
    result: dict[str, Any] = {
        "perplexity": [],
        "multi_doc": [],
        "passkey_depths": [],
        "distraction": [],
        "story": [],
        "lookup": [],
        "tasks": [],
        "retrieval": [],
        "exact": [],
        "retrieval_in_run": [],
        "decoding": [],
        "time_split": [],
    }
    listed = phases(config, retriever, 1)
    tasks = {settings.name for settings in config.tasks}
    without = {(phase.section, phase.context_tokens): phase.name for phase in listed if phase.memory == NONE}
    plain = ("perplexity", NONE)
    base = next((records.get(phase.name) for phase in listed if (phase.section, phase.memory) == plain), None)
    for phase in listed:
        record = records.get(phase.name)
        if not record:
            continue
        if phase.section != "retrieval":
            found = split_rows(phase.section, phase.memory, phase.context_tokens, record)
            result["time_split"] += [row | _note(record) for row in found]
        if phase.section == "perplexity":
            contexts = sorted(set(config.context_tokens)) if phase.memory == NONE else [phase.context_tokens]
            result["perplexity"] += [_perplexity_row(phase.memory, c, record, base, config) for c in contexts]
        elif phase.section == "passkey":
            result["tasks"] += _task_rows(phase.memory, record)
            result["passkey_depths"] += _depth_rows(phase.memory, record)
        elif phase.section in tasks:
            where = (phase.section, phase.context_tokens)
            part, rows = summarised(*where, phase.memory, record, records.get(without.get(where, "")))
            result[part] += [row | _note(source) for row, source in rows]
        elif phase.section == "multi_doc":
            result["multi_doc"] += _distraction_rows(phase.memory, phase.context_tokens, record)
        else:
            bench = [row for row in record if not row.get("in_run") and "decoding" not in row]
            for row in record:
                if "decoding" in row:
                    shown = {key: value for key, value in row.items() if key not in ("decoding", "splits")}
                    result["decoding"].append({"memory": row["decoding"], **shown})
                    result["time_split"] += split_rows("decoding", row["decoding"], row["memory_tokens"], [row])
            result["retrieval_in_run"] += [
                {key: value for key, value in row.items() if key != "in_run"} for row in record if row.get("in_run")
            ]
            if phase.memory == EXACT:
                result["exact"] += bench
            if phase.memory == retriever_label(retriever):
                result["retrieval"] += bench
    return result


def _blocks(record: Rows) -> list[tuple[float, int]]:
    return [(total, count) for row in record for total, count in row["blocks"]]


def _note(record: Rows) -> dict[str, Any]:
    """What a row has to admit: no index took part, or the numbers are another row's."""
    used = {row.get("index_used") for row in record}
    note: dict[str, Any] = {} if used == {None} else {"index_used": True in used}
    if record[0].get("same_as"):
        note["same_as"] = record[0]["same_as"]
    return note


def _scored(found: Estimate) -> dict[str, Any]:
    """Perplexity with its standard error by the delta method."""
    # In torch: a loss too large gives infinity, where math.exp raises.
    value = float(torch.tensor(found.mean, dtype=torch.float64).exp())
    return {
        "value": value,
        "standard_error": None if found.standard_error is None else value * found.standard_error,
        "nll": found.mean,
        "tokens": found.tokens,
    }


def _perplexity_row(
    memory: str, context: int, record: Rows, base: Rows | None, config: EvaluationConfig
) -> dict[str, Any]:
    blocks = _blocks(record)
    found = estimate(blocks)
    row: dict[str, Any] = {
        "context_tokens": context,
        "memory": memory,
        **_scored(found),
        "nll_standard_error": found.standard_error,
        "blocks": found.blocks,
        "documents": len(record),
        "target_tokens_per_s": found.tokens / max(sum(part["target_s"] for part in record), 1e-9),
    }
    if memory != NONE:
        row["ingest_tokens_per_s"] = context * len(record) / max(sum(part["ingest_s"] for part in record), 1e-9)
        if base:
            gain = difference(blocks, _blocks(base))
            row |= {"gain_nats": gain.mean, "gain_standard_error": gain.standard_error}
    return row | _note(record)


def _depth_rows(memory: str, record: Rows) -> list[dict[str, Any]]:
    cells: dict[tuple[int, int], list[bool]] = {}
    for part in record:
        place = min(int(part["depth"] * _DEPTHS), _DEPTHS - 1)
        cells.setdefault((part["context_tokens"], place), []).append(part["correct"])
    rows = []
    for (length, place), correct in sorted(cells.items()):
        low, high = wilson(sum(correct), len(correct))
        rows.append(
            {
                "context_tokens": length,
                "depth": place / _DEPTHS,
                "memory": memory,
                "accuracy": sum(correct) / len(correct),
                "n": len(correct),
                "low": low,
                "high": high,
            }
        )
    return rows


def _task_rows(memory: str, record: Rows) -> list[dict[str, Any]]:
    rows = []
    for length in sorted({part["context_tokens"] for part in record}):
        parts = [part for part in record if part["context_tokens"] == length]
        correct = sum(part["correct"] for part in parts)
        low, high = wilson(correct, len(parts))
        rows.append(
            {
                "task": "passkey",
                "context_tokens": length,
                "memory": memory,
                "accuracy": correct / len(parts),
                "n": len(parts),
                "correct": correct,
                "key_in_window": sum(part["key_in_window"] for part in parts),
                "low": low,
                "high": high,
            }
            | _note(parts)
        )
    return rows


def _distraction_rows(memory: str, context: int, record: Rows) -> list[dict[str, Any]]:
    rows = []
    base: list[tuple[float, int]] = []
    for amount in sorted({row["distractor_tokens"] for row in record}):
        parts = [row for row in record if row["distractor_tokens"] == amount]
        blocks = _blocks(parts)
        base = base or blocks
        saved = difference(blocks, base)
        rows.append(
            {
                "context_tokens": context,
                "distractor_tokens": amount,
                "memory": memory,
                **_scored(estimate(blocks)),
                "documents": len(parts),
                "own_share": _mean([part["own_share"] for part in parts]),
                "rise_nats": 0.0 - saved.mean,
                "rise_standard_error": saved.standard_error,
            }
            | _note(parts)
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
