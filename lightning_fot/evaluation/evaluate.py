"""Long-context evaluation of an attached model: the configured retriever beside exact search and no memory at all.

Each phase of the plan leaves a JSON-able record; :func:`~lightning_fot.evaluation.rows.summarise` turns the records
that there are into the rows of ``results.json``. So an evaluation that was cut short shows what it has, and goes on
where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_fot.config.evaluation import whole_readings
from lightning_fot.config.retriever import EXACT, NONE, RetrieverSpec, retriever_label
from lightning_fot.evaluation.measures.multi_doc import measure_distraction
from lightning_fot.evaluation.measures.passkey import (
    answer_is_found,
    passkey_examples,
    shared_memories,
    split_prompt,
    whole_answer_is_found,
)
from lightning_fot.evaluation.measures.perplexity import (
    block_sums,
    losses_of_whole,
    losses_with_memory,
    losses_without_memory,
)
from lightning_fot.evaluation.measures.retrieval import Capture, index_used, measure_capture, quality_in_run
from lightning_fot.evaluation.plan import (
    INGEST_COST,
    LOCAL_COST,
    SO_FAR,
    HasIds,
    Phase,
    Rows,
    is_measured,
    phases,
    select_documents,
)
from lightning_fot.evaluation.rows import summarise
from lightning_fot.evaluation.speed.decoding import measure_decoding, searched_exactly
from lightning_fot.evaluation.speed.split import Split, Stopwatch
from lightning_fot.evaluation.tasks.parts.texts import Texts
from lightning_fot.evaluation.tasks.runner import TaskRunner
from lightning_fot.model.backbone.layers import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.config.evaluation import EvaluationConfig
    from lightning_fot.model.lm import MemoryLM


class Progress(Protocol):
    """What is used of ``JobProgress``."""

    def plan(self, phases: Sequence[tuple[str, float]]) -> None:
        """Says what is to come."""
        ...

    def start(self, name: str) -> None:
        """Begins a phase."""
        ...

    def advance(self, units: float, note: str = "") -> None:
        """Counts work done."""
        ...

    def finish(self, name: str) -> None:
        """Ends a phase."""
        ...


def evaluate(
    lm: MemoryLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[HasIds],
    config: EvaluationConfig,
    progress: Progress | None = None,
    *,
    distractors: Any = None,
    texts: Texts | None = None,
    done: Mapping[str, Rows] | None = None,
    on_result: Callable[[str, Rows], None] | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Measures perplexity, passkey and other tasks, and recall and speed of retrieval.

    The model is put in evaluation mode and left in the mode it was in; nothing is kept that training would see.
    Where the configured retriever held too few keys to use its index, each of its searches was an exact one; the
    ``exact`` row is then not computed again but taken from it and says so (``"same_as"``).

    Args:
        lm: The attached model; ``lm.config.retriever`` is what is measured.
        tokenizer: Tokenizer of the model, for the passkey prompts.
        documents: Held-out documents.
        config: What to measure.
        distractors: (n,) ids of other documents, as many as ``config.distractor_tokens`` asks for.
        texts: By task, the held-out documents that it takes: see
            :func:`~lightning_fot.evaluation.tasks.parts.texts.select_texts`.
        progress: Shows what goes on; :func:`~lightning_fot.evaluation.plan.plan` gives its phases.
        done: Records of finished phases, from the same model and settings; these phases are skipped.
        on_result: Called with name and record of each phase as it ends, such as to write them to disk; within a phase
            of many documents, prompts or texts also as it goes, under the name with
            :data:`~lightning_fot.evaluation.plan.SO_FAR`.
        scratch: A folder of this model and these settings alone, for memories that take long to read: an evaluation
            that was killed goes on with them. None keeps none.

    Returns:
        ``perplexity``, ``multi_doc``, ``tasks``, ``passkey_depths``, ``distraction``, ``story``, ``lookup``,
        ``retrieval``, ``exact`` and ``retrieval_in_run``: lists of rows for ``results.json``.

    Raises:
        SettingError: No document is long enough, or a task's settings do not fit the model or its tokenizer.
    """
    run = _Evaluation(
        lm, tokenizer, documents, config, progress, dict(done or {}), on_result, distractors, texts, scratch
    )
    with lm.attachment.asked_with(config.score_factor), evaluation_mode(lm.model), torch.no_grad():
        run.run()
    return summarise(run.records, config, lm.config.retriever)


class _Evaluation:
    """One run over the phases; holds what later phases need of earlier ones."""

    def __init__(
        self,
        lm: MemoryLM,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[HasIds],
        config: EvaluationConfig,
        progress: Progress | None,
        records: dict[str, Rows],
        on_result: Callable[[str, Rows], None] | None,
        distractors: Any,
        texts: Texts | None,
        scratch: Path | None,
    ) -> None:
        self.lm = lm
        self.distractors = distractors
        self.tokenizer = tokenizer
        self.config = config
        self.progress = progress
        self.records = records
        self.on_result = on_result
        self.scratch = scratch
        config.check_readings(lm.config)
        self.label = retriever_label(lm.config.retriever)
        self.documents = select_documents(documents, config)
        self.phases = phases(config, lm.config.retriever, lm.config.window, len(self.documents))
        self.longest = max(config.context_tokens, default=0)
        self.examples = passkey_examples(config, tokenizer)
        self.tasks = TaskRunner(lm, tokenizer, config, texts or {}, self._advance)
        self.capture: Capture | None = None

    def run(self) -> None:
        self._replan()
        for phase in self.phases:
            if phase.name in self.records:
                continue
            if self.progress is not None:
                self.progress.start(phase.name)
            record = self._same_search(phase)
            if record is None:
                record = self._measure(phase)
            self.records[phase.name] = record
            self.records.pop(phase.name + SO_FAR, None)
            if self.on_result is not None:
                self.on_result(phase.name, record)
            if self.progress is not None:
                self.progress.finish(phase.name)
        self.capture = None
        self.tasks.release()
        if self.scratch is not None:
            with suppress(OSError):
                self.scratch.rmdir()

    def _replan(self) -> None:
        """Tells progress where the plan that it was given before anything was known is wrong."""
        if self.progress is None or not (self.records or len(self.documents) < self.config.documents):
            return
        self.progress.plan([(phase.name, phase.cost) for phase in self.phases if phase.name not in self.records])

    def _advance(self, units: float) -> None:
        if self.progress is not None:
            self.progress.advance(units)

    def _ingested(self, tokens: int) -> None:
        self._advance(tokens * INGEST_COST)

    def _same_search(self, phase: Phase) -> Rows | None:
        """The configured retriever's record, where all its searches were exact ones."""
        if phase.memory != EXACT or self.label == EXACT or phase.section == "retrieval":
            return None
        twin = next(
            other
            for other in self.phases
            if (other.section, other.context_tokens, other.memory) == (phase.section, phase.context_tokens, self.label)
        )
        record = self.records[twin.name]
        if phase.section == "passkey":
            # One phase of all lengths, and exact search need not be measured at each.
            measured = partial(is_measured, self.config, EXACT, self.label)
            record = [row for row in record if measured(row["context_tokens"])]
        if any(row["index_used"] is not False for row in record):
            return None
        return [{**row, "index_used": None, "same_as": self.label} for row in record]

    def _measure(self, phase: Phase) -> Rows:
        spec = EXACT if phase.memory == EXACT else self.lm.config.retriever
        if phase.section in self.tasks:
            return self.tasks.measure(phase, spec, partial(self._in_order, phase))
        if phase.section == "perplexity":
            return self._in_order(phase, len(self.documents), lambda place: self._perplexity(phase, spec, place))
        if phase.section == "passkey":
            return self._whole_passkey(phase) if phase.memory in whole_readings() else self._passkey(phase, spec)
        if phase.section == "multi_doc":
            return self._multi_doc(phase, spec)
        return self._retrieval(phase, spec)

    def _ids(self, place: int, start: int, stop: int) -> Tensor:
        ids = torch.as_tensor(self.documents[place].ids[start:stop]).long()
        return ids.to(self.lm.device)

    def _perplexity(self, phase: Phase, spec: RetrieverSpec, place: int) -> dict[str, Any]:
        target = self._ids(place, self.longest, self.longest + self.config.target_tokens + 1)
        context = self._ids(place, self.longest - phase.context_tokens, self.longest)
        row: dict[str, Any] = {"document": self.documents[place].name, "index_used": None}
        reading, scoring = Stopwatch(self.lm.device), Stopwatch(self.lm.device)
        if phase.memory == NONE:
            with scoring.running():
                losses = losses_without_memory(self.lm, target, self._advance)
        elif phase.memory in whole_readings():
            advance = self._shares(phase, len(self.documents) * (len(context) + len(target) - 1))
            with scoring.running():
                losses, read = losses_of_whole(self.lm, context, target, phase.memory, advance)
            reading.split, scoring.split = Split(read), scoring.split - Split(read)
        else:
            wanted = place == 0 and phase.context_tokens == self.longest and phase.memory == self.label
            capture = Capture(self.lm) if wanted else None
            memory = self.lm.new_memory(1, spec)
            with reading.running(memory):
                if capture is None:
                    self.lm.ingest(context[None], memory=memory, progress=self._ingested)
                else:
                    capture.ingest(context[None], memory, self._ingested)
                memory.flush()
            row["index_used"] = index_used(memory)
            with scoring.running(), nullcontext() if capture is None else capture.target(memory):
                losses = losses_with_memory(self.lm, target, memory, self._advance, scoring)
            self.capture = capture or self.capture
        if len(context):
            row["ingest_s"] = reading.split.seconds
        row["target_s"] = scoring.split.seconds
        row["splits"] = {
            "reading": {"tokens": len(context), **reading.split.as_dict()},
            "scoring": {"tokens": len(losses), **scoring.split.as_dict()},
        }
        row["blocks"] = [list(block) for block in block_sums(losses)]
        return row

    def _multi_doc(self, phase: Phase, spec: RetrieverSpec) -> Rows:
        documents = [
            (
                document.name,
                self._ids(place, 0, self.longest),
                self._ids(place, self.longest, self.longest + self.config.target_tokens + 1),
            )
            for place, document in enumerate(self.documents)
        ]
        others = torch.as_tensor(self.distractors, device=self.lm.device).long()
        amounts = sorted({0, *self.config.distractor_tokens})
        kept, keep = self._so_far(phase)
        return measure_distraction(
            self.lm,
            spec,
            documents,
            others,
            amounts,
            self._advance,
            done=kept,
            keep=keep,
            folder=None if self.scratch is None else self.scratch / f"multi_doc_{phase.memory}",
        )

    def _so_far(self, phase: Phase) -> tuple[Rows, Callable[[Rows], None]]:
        """Rows that were measured before a phase was interrupted, and what keeps them as more are."""
        name = phase.name + SO_FAR

        def keep(rows: Rows) -> None:
            self.records[name] = list(rows)
            if self.on_result is not None:
                self.on_result(name, self.records[name])

        return list(self.records.get(name, ())), keep

    def _in_order(self, phase: Phase, count: int, measure: Callable[[int], dict[str, Any]]) -> Rows:
        """Rows 0 to ``count``, but for those that were measured before."""
        rows, keep = self._so_far(phase)
        for place in range(len(rows), count):
            rows.append(measure(place))
            if len(rows) < count:
                keep(rows)
        return rows

    def _retrieval(self, phase: Phase, spec: RetrieverSpec) -> Rows:
        if self.capture is None:
            # Resumed after the perplexity of the longest context: read it once more, for its queries and keys.
            longest = next(p for p in self.phases if (p.memory, p.context_tokens) == (self.label, self.longest))
            self._perplexity(longest, self.lm.config.retriever, 0)
        assert self.capture is not None
        rows = measure_capture(self.capture, spec, self.config, lambda share: self._advance(share * phase.cost))
        rows += self._decoding(phase)
        if phase.memory == self.label:
            rows += [{"in_run": True, **row} for row in quality_in_run(self.capture, self.label, self.config)]
        return rows

    def _decoding(self, phase: Phase) -> Rows:
        """Tokens one by one beside the captured pairs; the configured retriever's phase measures without them too."""
        assert self.capture is not None
        assert self.capture.memory is not None
        held = self.capture.memory if phase.memory == self.label else searched_exactly(self.capture.memory)
        ids = self._ids(0, self.longest, self.longest + self.config.target_tokens)
        asked = {phase.memory: held} if phase.memory != self.label else {NONE: None, phase.memory: held}
        found = {kind: measure_decoding(self.lm, memory, ids) for kind, memory in asked.items()}
        return [{"decoding": kind, **row} for kind, row in found.items() if row is not None]

    def _shares(self, phase: Phase, tokens: int) -> Callable[[int], None]:
        """Counts so many tokens as the phase's whole cost."""
        return lambda read: self._advance(read * phase.cost / tokens)

    def _whole_passkey(self, phase: Phase) -> Rows:
        advance = self._shares(phase, sum(length for length, _ in self.examples))

        def measure(place: int) -> dict[str, Any]:
            length, example = self.examples[place]
            return {
                "context_tokens": length,
                "key_in_window": True,
                "depth": example.depth,
                "correct": whole_answer_is_found(self.lm, example, phase.memory, advance),
                "index_used": None,
            }

        return self._in_order(phase, len(self.examples), measure)

    def _passkey(self, phase: Phase, spec: RetrieverSpec) -> Rows:
        local = self.lm.config.last_context_length or self.lm.config.window
        rows, keep = self._so_far(phase)
        answered = {row["example"] for row in rows}
        examples = [
            (number, length, example)
            for number, (length, example) in enumerate(self.examples)
            if number not in answered and is_measured(self.config, phase.memory, self.label, length)
        ]
        split = [split_prompt(example, local) for _, _, example in examples]
        if phase.memory == NONE:
            memories: Any = ((place, None) for place in range(len(split)))
        else:
            memories = shared_memories(self.lm, [prefix for prefix, _ in split], spec, self._ingested)
        for place, memory in memories:
            number, length, example = examples[place]
            if memory is not None:
                memory.flush()
            # The answer is a part of the local tokens, all but its last one; it says nothing of where the key was told.
            prompt = split[place][1][: len(split[place][1]) - len(example.answer_ids) + 1]
            rows.append(
                {
                    "example": number,
                    "context_tokens": length,
                    "key_in_window": str(example.number) in str(self.tokenizer.decode(prompt)),
                    "depth": example.depth,
                    "correct": answer_is_found(self.lm, example, split[place][1], memory),
                    "index_used": None if memory is None else index_used(memory),
                }
            )
            if len(rows) < len(answered) + len(examples):
                keep(rows)
            self._advance(len(split[place][1]) * LOCAL_COST)
        return sorted(rows, key=lambda row: row["example"])
