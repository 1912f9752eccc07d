"""What an evaluation does, in which order and at which cost. Imports no torch.

A phase is the unit of progress and of resuming: its name is the key of its record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lightning_fot.config.evaluation import FULL_CONTEXT, whole_readings
from lightning_fot.config.retriever import EXACT, NONE, RetrieverSpec, index_size, retriever_label
from lightning_fot.errors import SettingError

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig

# What stands for one pass of one token through the whole model, logits included. Measured on SmolLM2-135M with memory
# layers 10 and 20 of 30; other models shift all phases alike, so that an estimate of the time left stays useful.
INGEST_COST = 0.55
LOCAL_COST = 0.8
# A retrieval measurement: building from M keys, and one timed call of Q queries.
BUILD_COST = 0.25
QUERY_COST = 0.4
# Tokens of context whose attention, in every layer, takes as long as the rest of the model.
ATTENTION_TOKENS = 8192
GRID = 5
# What a phase leaves: rows of results, or of what they are made from.
Rows = list[dict[str, Any]]
# What the name of a phase gets where a record holds only what it has measured so far.
SO_FAR = " (so far)"


class HasIds(Protocol):
    """A document that is tokenised: ``ids`` is a 1-D integer array."""

    @property
    def name(self) -> str:
        """Where it came from."""
        ...

    @property
    def ids(self) -> Any:
        """Token numbers, (n,) integers."""
        ...


DocumentT = TypeVar("DocumentT", bound=HasIds)


@dataclass(frozen=True)
class Phase:
    """One measurement that is made as a whole.

    Args:
        name: Unique; also what progress shows.
        section: What is measured: ``perplexity``, ``retrieval``, ``passkey``, ``multi_doc``, or the name of a task.
        memory: ``none``, ``exact``, the retriever's name, or a reading without a memory (:func:`whole_readings`).
        context_tokens: Tokens in memory; 0 where the phase covers several lengths or none.
        cost: Token passes, as progress counts them.
    """

    name: str
    section: str
    memory: str
    context_tokens: int
    cost: float


def phases(
    config: EvaluationConfig, retriever: RetrieverSpec, window: int, documents: int | None = None
) -> list[Phase]:
    """All phases in the order they run.

    Exact phases cost nothing where the configured retriever holds too few keys for an index: each of its searches then
    is exact, and the numbers are taken from it.

    Args:
        config: What to measure.
        retriever: The configured retriever's specification.
        window: Local context in tokens.
        documents: Documents that are long enough; None takes ``config.documents``.
    """
    label = retriever_label(retriever)
    kinds = [label] if label == EXACT else [label, EXACT]
    kinds = kinds if "memory" in config.readings else []

    def compared(tokens: int) -> list[str]:
        return [kind for kind in kinds if is_measured(config, kind, label, tokens)]

    whole = [reading for reading in whole_readings() if reading in config.readings]
    count = config.documents if documents is None else min(documents, config.documents)
    contexts = sorted(set(config.context_tokens))
    listed: list[Phase] = []
    if contexts:
        listed.append(Phase("perplexity: no memory", "perplexity", NONE, 0, float(count * config.target_tokens)))
    for context in contexts:
        for kind in compared(context):
            cost = count * (context * INGEST_COST + config.target_tokens)
            cost = 0.0 if kind != label and context < index_size(retriever) else cost
            listed.append(Phase(f"perplexity: {kind}, {context} tokens", "perplexity", kind, context, cost))
        for reading in whole:
            cost = count * whole_cost(reading, context + config.target_tokens)
            name = f"perplexity: {whole_readings()[reading]}, {context} tokens"
            listed.append(Phase(name, "perplexity", reading, context, cost))
    for kind in kinds if contexts else ():
        settings = len(config.query_grid or ()) or GRID
        calls = config.retrieval_repeats * (1 if kind == EXACT else settings)
        cost = BUILD_COST * contexts[-1] + QUERY_COST * calls * config.retrieval_queries
        listed.append(Phase(f"retrieval: {kind}, {contexts[-1]} tokens", "retrieval", kind, contexts[-1], cost))
    if config.distractor_tokens:
        # The other documents are read once, the longest context and the target behind each amount of them.
        others, amounts = max(config.distractor_tokens), 1 + len(set(config.distractor_tokens))
        cost = others * INGEST_COST + amounts * count * (contexts[-1] * INGEST_COST + config.target_tokens)
        for kind in compared(others + contexts[-1]):
            known = kind != label and others + contexts[-1] < index_size(retriever)
            listed.append(Phase(f"multi-doc: {kind}", "multi_doc", kind, contexts[-1], 0.0 if known else cost))
    if config.passkey_tokens and config.passkey_samples:
        lengths = sorted(set(config.passkey_tokens))
        listed.append(Phase("passkey: no memory", "passkey", NONE, 0, _passkey_cost(config, lengths, window, 0.0)))
        for kind in compared(lengths[0]):
            read = [length for length in lengths if is_measured(config, kind, label, length)]
            known = kind != label and read[-1] < index_size(retriever)
            cost = 0.0 if known else _passkey_cost(config, read, window, INGEST_COST)
            listed.append(Phase(f"passkey: {kind}", "passkey", kind, 0, cost))
        for reading in whole:
            cost = config.passkey_samples * sum(whole_cost(reading, length) for length in lengths)
            listed.append(Phase(f"passkey: {whole_readings()[reading]}", "passkey", reading, 0, cost))
    # Kind by kind: a memory that grows is the only one.
    for task in config.tasks:
        for kind in (NONE, *kinds) if task.without_memory else kinds:
            for length in task.lengths:
                if not is_measured(config, kind, label, length):
                    continue
                known = kind == EXACT != label and length < index_size(retriever)
                asked = task.tokens_to_ask(length) * LOCAL_COST
                cost = asked if kind == NONE else asked + task.tokens_to_read(length) * INGEST_COST
                shown = "no memory" if kind == NONE else kind
                name = f"{task.name}: {shown}, {length} tokens"
                listed.append(Phase(name, task.name, kind, length, 0.0 if known else cost))
        for length in filter(task.reads_whole, task.lengths):
            cost = whole_cost(FULL_CONTEXT, length) + task.tokens_to_ask(length) * LOCAL_COST
            name = f"{task.name}: {whole_readings()[FULL_CONTEXT]}, {length} tokens"
            listed.append(Phase(name, task.name, FULL_CONTEXT, length, cost))
    return listed


def is_measured(config: EvaluationConfig, kind: str, label: str, tokens: int) -> bool:
    """Whether a kind is measured with so many tokens in memory: exact search beside another retriever may not be.

    Args:
        config: What to measure.
        kind: As :attr:`Phase.memory`.
        label: The configured retriever's.
        tokens: In memory, or in a prompt.
    """
    return kind != EXACT or kind == label or config.exact_tokens is None or tokens <= config.exact_tokens


def _passkey_cost(config: EvaluationConfig, lengths: Sequence[int], window: int, ingest_cost: float) -> float:
    local = sum(min(length, window) for length in lengths) * LOCAL_COST
    return config.passkey_samples * (local + sum(max(length - window, 0) for length in lengths) * ingest_cost)


def whole_cost(reading: str, tokens: int) -> float:
    """Token passes that a text of so many tokens takes, read without a memory."""
    return tokens * (LOCAL_COST + (tokens / 2 / ATTENTION_TOKENS if reading == FULL_CONTEXT else 0.0))


def plan(
    config: EvaluationConfig, retriever: RetrieverSpec = EXACT, window: int = 512, documents: int | None = None
) -> list[tuple[str, float]]:
    """Phases and their costs in token passes, for ``JobProgress.plan``.

    Args:
        config: What to measure.
        retriever: The configured retriever's specification.
        window: Local context in tokens.
        documents: Documents that are long enough; None takes ``config.documents``.

    Example:
        >>> from lightning_fot.config import EvaluationConfig
        >>> plan(EvaluationConfig(context_tokens=[2048], passkey_tokens=[]), "exact")[0]
        ('perplexity: no memory', 2048.0)
    """
    return [(phase.name, phase.cost) for phase in phases(config, retriever, window, documents)]


def tokens_needed(config: EvaluationConfig) -> int:
    """Tokens that a document needs: the longest context, the target, and one more to predict."""
    return max(config.context_tokens, default=0) + config.target_tokens + 1


def fit_to_documents(documents: Sequence[HasIds], config: EvaluationConfig, window: int) -> EvaluationConfig:
    """The same evaluation with contexts that the held-out documents have room for.

    Contexts that are too long give way to the longest that fits, in whole windows. Where not even the shortest fits,
    a third of a document is scored and the rest is its context.

    Args:
        documents: Held-out documents.
        config: What to measure.
        window: Local context in tokens.

    Returns:
        ``config`` itself when everything fits, or when nothing can: :func:`select_documents` then says why.
    """
    lengths = sorted((len(document.ids) for document in documents), reverse=True)
    if not config.context_tokens or not lengths or lengths[0] >= tokens_needed(config):
        return config
    # As many documents as asked for, unless that halves the length.
    several = lengths[min(config.documents, len(lengths)) - 1]
    length = several if 2 * several >= lengths[0] else lengths[0]
    target = config.target_tokens
    if length - target - 1 < min(*config.context_tokens, length):
        target = min(target, length // 3 // window * window)
    room = (length - target - 1) // window * window
    if target < 1 or room < 1:
        return config
    kept = [context for context in config.context_tokens if context < room]
    return replace(config, context_tokens=[*kept, room], target_tokens=target)


def select_distractors(documents: Iterable[HasIds], scored: Sequence[HasIds], config: EvaluationConfig) -> Any:
    """Token ids (n,) of documents that are not scored, as many as ``config.distractor_tokens`` asks for.

    Args:
        documents: Held-out documents, or those of ``config.distractor_paths``; no more are taken than are needed.
        scored: Documents that are scored; those of their names are left out.
        config: What to measure.

    Raises:
        SettingError: They have fewer.
    """
    import numpy as np

    wanted = max(config.distractor_tokens, default=0)
    names = {document.name for document in scored}
    parts, total = [], 0
    for document in documents:
        if total >= wanted:
            break
        if document.name not in names:
            parts.append(np.asarray(document.ids[: wanted - total], dtype=np.int64))
            total += len(parts[-1])
    if total < wanted:
        own = config.distractor_paths is not None
        whose = "the documents of evaluation.distractor_paths" if own else "held-out documents that are not scored"
        more = "name more paths" if own else "hold out more (data.heldout_fraction)"
        raise SettingError(
            "evaluation.distractor_tokens",
            config.distractor_tokens,
            f"{whose} have {total} tokens",
            f"Use fewer, or {more}.",
        )
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def select_documents(documents: Sequence[DocumentT], config: EvaluationConfig) -> list[DocumentT]:
    """The documents on which perplexity is measured: the first ``config.documents`` that are long enough.

    Call it before training, so that documents that are too short are known before hours are spent.

    Args:
        documents: Held-out documents.
        config: What to measure.

    Raises:
        SettingError: None is long enough.
    """
    if not config.context_tokens:
        return []
    needed = tokens_needed(config)
    chosen = [document for document in documents if len(document.ids) >= needed][: config.documents]
    if not chosen:
        longest = max((len(document.ids) for document in documents), default=0)
        room = longest - config.target_tokens - 1
        hint = f"Use at most {room}, or" if room > 0 else "Lower evaluation.target_tokens and context_tokens, or"
        raise SettingError(
            "evaluation.context_tokens",
            config.context_tokens,
            f"with target_tokens={config.target_tokens} needs a held-out document of {needed} tokens; the longest of "
            f"{len(documents)} has {longest}",
            f"{hint} give longer documents in data.paths.",
        )
    return chosen
