"""Runs tasks: reads each text into a memory, asks beside it, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_fot.config.evaluation import FULL_CONTEXT
from lightning_fot.config.retriever import EXACT, NONE, RetrieverSpec
from lightning_fot.evaluation.measures.perplexity import read_logits, token_losses
from lightning_fot.evaluation.measures.retrieval import index_used, live_quality, sample_rows
from lightning_fot.evaluation.measures.whole_text import FullContext, positions_left
from lightning_fot.evaluation.plan import INGEST_COST, LOCAL_COST, Phase, whole_cost
from lightning_fot.evaluation.speed.split import Stopwatch
from lightning_fot.evaluation.tasks.lookup import as_answer
from lightning_fot.evaluation.tasks.parts.episode import Episode, Ids, Measure, Probe
from lightning_fot.evaluation.tasks.parts.texts import Texts
from lightning_fot.evaluation.tasks.registry import make_tasks
from lightning_fot.model.reading.batched import read

if TYPE_CHECKING:
    from lightning_fot.config.evaluation import EvaluationConfig
    from lightning_fot.memory.memory import Memory
    from lightning_fot.model.lm import MemoryLM

Row = dict[str, Any]
# Queries a KV head whose search is compared with an exact one.
_QUERIES = 64


@dataclass(frozen=True)
class Answer:
    """How one answer was predicted.

    Args:
        right: Its tokens that were the most likely ones, given those before them.
        tokens: Its tokens.
        nats: Loss over them.
        said: Ids of the answer, or of what is said in its place; none where that is not asked for.
    """

    right: int
    tokens: int
    nats: float
    said: tuple[int, ...] = ()

    @property
    def correct(self) -> bool:
        """Whether greedy decoding gives it whole."""
        return self.right == self.tokens


# Given ids (n,) and a number, the logits (number, V) of what comes after the last ones.
Read = Callable[[Tensor, int], Tensor]


def beside(lm: MemoryLM, memory: Memory | None, watch: Stopwatch | None = None) -> Read:
    """Reads beside a memory, which stays as it is; ``watch`` takes what the memory did meanwhile."""

    def logits(ids: Tensor, keep: int) -> Tensor:
        found, after = read_logits(lm, ids, memory, keep=keep)
        if watch is not None and memory is not None:
            watch.count(after)
        return found

    return logits


def ask(lm: MemoryLM, probe: Probe, memory: Memory | None, watch: Stopwatch | None = None) -> list[Answer]:
    """Each answer of a probe beside a memory, which stays as it is; ``watch`` takes what the memory did meanwhile."""
    return ask_by(beside(lm, memory, watch), probe, lm.device)


@torch.no_grad()
def ask_by(read_on: Read, probe: Probe, device: torch.device) -> list[Answer]:
    """Each answer of a probe that is read so."""
    first, last = probe.answers[0][0], probe.answers[-1][1]
    ids = torch.from_numpy(probe.ids.astype(np.int64)).to(device)
    logits = read_on(ids[: last - 1], last - first)
    losses = token_losses(logits, ids[first:last])
    right = (logits.argmax(-1) == ids[first:last]).cpu()
    if probe.choices:
        for start, stop in probe.answers:
            right[start - first : stop - first] = _chosen(
                logits[start - first : stop - first], ids[start:stop].tolist(), probe
            )
    return [
        Answer(
            int(right[start - first : stop - first].sum()),
            stop - start,
            float(losses[start - first : stop - first].double().sum()),
            _said(read_on, ids[:stop], logits[start - first : stop - first].argmax(-1), probe.say),
        )
        for start, stop in probe.answers
    ]


def _said(read_on: Read, ids: Tensor, likely: Tensor, tokens: int) -> tuple[int, ...]:
    """What greedy decoding says, so many tokens, in place of the end of ids (n,) for which ``likely`` was likely."""
    start = len(ids) - len(likely)
    wrong = (likely != ids[start:]).nonzero()
    if not tokens or not len(wrong):
        return tuple(ids[start:].tolist()) if tokens else ()
    # Up to the first wrong one, what was likely is what decoding gives.
    said = torch.cat([ids[:start], likely[: int(wrong[0]) + 1]])
    while len(said) < start + tokens:
        said = torch.cat([said, read_on(said, 1)[-1:].argmax(-1)])
    return tuple(said[start:].tolist())


def _chosen(logits: Tensor, answer: list[int], probe: Probe) -> Tensor:
    """Which tokens (n,) of an answer are the best of those that a choice has there, after the same tokens."""
    right = []
    for place, token in enumerate(answer):
        allowed = {one[place] for one in probe.choices if list(one[:place]) == answer[:place]}
        right.append(all(float(logits[place, token]) > float(logits[place, other]) for other in allowed - {token}))
    return torch.tensor(right)


def _room(episode: Episode) -> int:
    """Tokens that are read behind the text, at most."""
    return max(len(probe.ids) + probe.say for probe in episode.probes)


class TaskRunner:
    """All tasks of an evaluation. What is wrong with one is told when this is made.

    A text that goes on where the one before ended is read on in the same memory.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        config: What to measure.
        texts: By task, the held-out documents that it asks for.
        advance: Called with the token passes done.
    """

    def __init__(
        self,
        lm: MemoryLM,
        tokenizer: Any,
        config: EvaluationConfig,
        texts: Texts,
        advance: Callable[[float], None],
    ) -> None:
        self._lm = lm
        self._advance = advance
        self._tasks = make_tasks(config, lm.config, tokenizer, texts)
        # Memory kind, what was read, and the memory.
        self._kept: tuple[str, Ids, Memory] | None = None
        # What was read into the backbone's own context, and the context.
        self._whole: tuple[Ids, FullContext] | None = None
        self._tokenizer = tokenizer

    def __contains__(self, section: str) -> bool:
        return section in self._tasks

    def measure(
        self, phase: Phase, spec: RetrieverSpec, in_order: Callable[[int, Callable[[int], Row]], list[Row]]
    ) -> list[Row]:
        """Rows of a phase, one an episode: ``right``, ``tokens`` and ``nats`` of each answer, and what it took.

        Args:
            phase: What is measured.
            spec: Specification of the retriever.
            in_order: Given the number of rows and what measures one by its place, gives all of them.
        """
        task = self._tasks[phase.section]
        if isinstance(task, Measure):
            self.release()
            return task.measure(self._lm, phase.context_tokens, None if phase.memory == NONE else spec, self._advance)
        episodes = list(task.episodes(phase.context_tokens))
        if phase.memory == FULL_CONTEXT and not all(map(self._fits, episodes)):
            # Longer than the backbone's positions reach: nothing is measured.
            return []
        return in_order(len(episodes), lambda place: self._measure(episodes[place], phase.memory, spec))

    def release(self) -> None:
        """Lets go of what was read."""
        self._kept = self._whole = None

    def _fits(self, episode: Episode) -> bool:
        """Whether the backbone's own context holds a text and each question."""
        return positions_left(self._lm, len(episode.context)) >= _room(episode)

    def _measure(self, episode: Episode, kind: str, spec: RetrieverSpec) -> Row:
        row: Row = {"index_used": None}
        reading, asking = Stopwatch(self._lm.device), Stopwatch(self._lm.device)
        memory, whole = None, None
        if episode.asked:
            row["asked"] = episode.asked
        if kind == NONE:
            self.release()
        elif kind == FULL_CONTEXT:
            with reading.running():
                whole = self._full_context(episode)
        else:
            began = time.perf_counter()
            memory, row["read_tokens"] = self._memory(episode.context, kind, spec, reading)
            row["read_s"] = time.perf_counter() - began
            row |= {"bytes": memory.nbytes, "index_used": index_used(memory)}
        answers: list[Answer] = []
        read_on = beside(self._lm, memory, asking) if whole is None else whole.logits
        with asking.running():
            for probe in episode.probes:
                answers += ask_by(read_on, probe, self._lm.device)
                self._advance(len(probe.ids) * LOCAL_COST)
        row["ask_s"] = asking.split.seconds
        row["splits"] = {
            "reading": {"tokens": row.get("read_tokens", 0), **reading.split.as_dict()},
            "asking": {"tokens": sum(len(probe.ids) for probe in episode.probes), **asking.split.as_dict()},
        }
        for field in ("right", "tokens", "nats"):
            row[field] = [getattr(answer, field) for answer in answers]
        if any(probe.say for probe in episode.probes):
            row["said"] = [as_answer(self._tokenizer.decode(list(answer.said))) for answer in answers]
        if memory is not None and kind != EXACT and row["index_used"]:
            row |= self._quality(episode.probes, memory)
        return row

    def _full_context(self, episode: Episode) -> FullContext:
        """The text in the backbone's own context."""
        if self._whole is None or not np.array_equal(self._whole[0], episode.context):
            self.release()
            ids = torch.from_numpy(episode.context.astype(np.int64)).to(self._lm.device)
            cost = whole_cost(FULL_CONTEXT, len(ids)) / len(ids)
            whole = FullContext(self._lm, ids, _room(episode), lambda tokens: self._advance(tokens * cost))
            self._whole = episode.context, whole
        return self._whole[1]

    def _memory(self, context: Ids, kind: str, spec: RetrieverSpec, watch: Stopwatch) -> tuple[Memory, int]:
        """A memory that holds the context, its index built, and the tokens that had to be read for it."""
        config = self._lm.config
        # A text is cut where windows are, and only where they share nothing.
        whole = 0 if config.overlap or config.sink_tokens else len(context) // config.window * config.window
        done = 0
        if self._kept is not None:
            kept, before, _ = self._kept
            if kept == kind and len(before) <= whole and np.array_equal(context[: len(before)], before):
                done = len(before)
        if not done:
            # Let go of first: two memories may be too much.
            self._kept = None
        memory = self._lm.new_memory(1, spec) if self._kept is None else self._kept[2]
        self._read(context[done:whole], memory, watch)
        self._kept = (kind, context[:whole], memory)
        if whole < len(context):
            memory = memory.snapshot()
            self._read(context[whole:], memory, watch)
        return memory, len(context) - done

    def _read(self, ids: Ids, memory: Memory, watch: Stopwatch) -> None:
        if len(ids):
            new = torch.from_numpy(ids.astype(np.int64))
            with watch.running(memory):
                read(self._lm.attachment, new, memory, lambda tokens: self._advance(tokens * INGEST_COST))
                memory.flush()

    def _quality(self, probes: Sequence[Probe], memory: Memory) -> Row:
        """Recall of the searches of the first probe, and the softmax mass they found; mean over layers."""
        with self._lm.record_queries() as recorded:
            ask(self._lm, probes[0], memory)
        found = [
            live_quality(self._lm, number, layer, sample_rows(recorded[number][0], _QUERIES))
            for number, layer in memory.layers.items()
        ]
        return {
            name: sum(getattr(quality, name) for quality in found) / len(found) for name in ("recall", "mass_recall")
        }
