"""The model ``lightning-fot`` of EleutherAI's lm-evaluation-harness (extra ``lm-eval``): a backbone with its memory on.

Importing this module registers it. Requests that fit the local window are answered by the harness's own code on the
plain backbone; longer ones go through the memory, however long they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm

from lightning_fot import __version__
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.scoring import (
    answer_apart,
    by_context,
    new_tokens,
    plain_tokens,
    score_continuations,
)
from lightning_fot.request.harness import MODEL_NAME, batch_count, model_settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from lightning_fot.model.lm import MemoryLM

# No prompt is cut: what leaves the window is in memory.
_UNLIMITED = 2**31
_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class MemoryHarness(HFLM):
    """A model with a memory, as the harness asks it.

    Args:
        pretrained: An attached model; or, as text, ``model.backbone``.
        tokenizer: Of an attached model. As text it only tells RULER's tasks which one to measure their prompts with.
        config: YAML or shipped name, as for ``lightning run``; only its section ``model`` counts.
        ckpt_path: Trained weights; ``last`` with the ``config.yaml`` of a run folder.
        batch_size: Short requests, and long prompts to be continued, in one call; a number, not ``auto``.
        max_batch_size: Given by the harness; not used.
        device: Where to compute; None takes the GPU where there is one.
        max_length: Prompts are cut to so many tokens, from the left; None never cuts.
        **settings: Dotted settings such as ``{"model.memory.top_k": 64}``, and what the harness's own ``HFLM`` takes of
            ``add_bos_token``, ``prefix_token_id``, ``softmax_dtype``, ``enable_thinking``, ``think_end_token`` and
            ``chat_template_args``.

    Raises:
        SettingError: A setting cannot work.
        MissingLibraryError: A library that the settings need is not installed.
    """

    def __init__(
        self,
        pretrained: str | MemoryLM | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        config: str | None = None,
        ckpt_path: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        del max_batch_size
        count = batch_count(batch_size)
        own = {name: settings.pop(name) for name in _OF_THE_HARNESS if name in settings}
        self.settings: dict[str, Any] = {}
        if pretrained is None or isinstance(pretrained, str):
            given: Mapping[str, Any] = {"config": config, "model.backbone": pretrained, "ckpt_path": ckpt_path}
            model = model_settings({**{key: value for key, value in given.items() if value is not None}, **settings})
            self.settings = model.flat()
            from lightning_fot.training.opening import open_model

            self.lm, tokenizer = open_model(model)
        else:
            if settings or config or ckpt_path:
                raise SettingError("pretrained", "a model", "has its settings already", "Leave the others out.")
            self.lm = pretrained.eval()
        # The harness asks for the GPU unless it is told otherwise, and takes the CPU where there is none.
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            torch.nn.Module.to(self.lm.model, torch.device(device))
            self.lm.gates.to(device)
        super().__init__(
            self.lm.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=count,
            max_length=max_length or _UNLIMITED,
            **own,
        )
        self._plain = plain_tokens(self.lm.config)

    def get_model_info(self) -> dict[str, Any]:
        """Goes into the harness's results: what was measured."""
        return {
            "model_num_parameters": self.lm.model.num_parameters(),
            "model_dtype": str(self.lm.model.dtype),
            "lightning_fot": __version__,
            **self.settings,
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[_Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether greedy; what is short goes the harness's way."""
        return answer_apart(
            requests,
            lambda request: len(request[1]) + len(request[2]) - 1 <= self._plain,
            lambda short: super(MemoryHarness, self)._loglikelihood_tokens(short, disable_tqdm, override_bs),
            lambda long: self._beside_memory(long, disable_tqdm),
        )

    def _beside_memory(self, requests: Sequence[_Encoded], disable_tqdm: bool) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        cut = [(self._cut(request), index) for index, request in enumerate(requests)]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring beside the memory") as bar:
            for context, indices in by_context(cut).items():
                continuations = [requests[index][2] for index in indices]
                scores = score_continuations(self.lm, context, continuations, self.softmax_dtype)
                for index, score in zip(indices, scores, strict=True):
                    found[index] = score.logprob, score.greedy
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                bar.update(len(indices))
        return [found[index] for index in range(len(requests))]

    def _cut(self, request: _Encoded) -> list[int]:
        """The context, without what ``max_length`` leaves no room for."""
        _, context, continuation = request
        return context[-max(1, self.max_length + 1 - len(continuation)) :]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations; a batch holds either short requests or long ones."""

        def is_short(request: Instance) -> bool:
            prompt, options = request.args
            return len(self.tok_encode(prompt)) + new_tokens(options, self.max_gen_toks) - 1 <= self._plain

        def answer(some: list[Instance]) -> list[str]:
            answers: list[str] = super(MemoryHarness, self).generate_until(some, disable_tqdm)
            return answers

        return answer_apart(requests, is_short, answer, answer)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Token ids (B, T + new) of prompts (B, T), padded on the left."""
        if max_length - 1 <= self._plain:
            plain: Tensor = super()._model_generate(context, max_length, stop, **options)
            return plain
        if not options.get("do_sample"):
            # Greedy: transformers warns of a temperature that has no meaning.
            options = {**options, "do_sample": False}
            options.pop("temperature", None)
        generated: Tensor = self.lm.generate(
            context,
            max_length=max_length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context)),
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return generated


_OF_THE_HARNESS = (
    "add_bos_token",
    "prefix_token_id",
    "softmax_dtype",
    "enable_thinking",
    "think_end_token",
    "chat_template_args",
)

register_model(MODEL_NAME)(MemoryHarness)
