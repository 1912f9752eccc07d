"""Facts asked for as a user asks an assistant: through the tokenizer's chat template, as ``lightning ask`` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from lightning_fot.errors import SettingError

_QUESTION = re.compile(r"(?:Question: |Q: )?(.+\?)(?:\n(?:Answer|A):(.*)| (?:It is|Yes, it is))", re.DOTALL)


class Asked(Protocol):
    """What is asked of a fact: a question in other words than it was told in, and the value."""

    @property
    def asked(self) -> str: ...
    @property
    def value(self) -> str: ...


def question_of(fact: Asked) -> tuple[str, str] | None:
    """Question and answer as two people say them; None where the fact is asked for by no question.

    Example:
        ``Q: Where is Ann?``, a line break and ``A: In the``, with the value `` hall``, become ``Where is Ann?`` and
        ``In the hall``.
    """
    found = _QUESTION.fullmatch(fact.asked)
    if found is None:
        return None
    answer = f"{(found[2] or '').strip()}{fact.value}".strip()
    return found[1], answer[:1].upper() + answer[1:]


def dialogue(pairs: Sequence[tuple[str, str]], tokenizer: Any, room: int, setting: str) -> tuple[list[int], list[bool]]:
    """Questions and answers one after the other, as many as there is room for.

    Args:
        pairs: Questions and answers.
        tokenizer: A Hugging Face tokenizer with a chat template.
        room: Tokens, at most.
        setting: Name of the setting in errors.

    Returns:
        Ids, and which of them the loss counts: answers, and the control token that ends each.

    Raises:
        SettingError: The tokenizer has no chat template, or one that writes earlier turns anew when later ones come.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SettingError(setting, None, "needs a tokenizer with a chat template", "Set it to 0.")
    controls = set(getattr(tokenizer, "all_special_ids", ()))
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    targets: list[bool] = []
    before = ""
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": answer})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if not asked.startswith(before) or not whole.startswith(f"{asked}{answer}"):
            problem = "cannot be had with a chat template that writes a conversation anew at each turn"
            raise SettingError(setting, None, problem, "Set it to 0.")
        parts = [asked[len(before) :], answer, whole[len(asked) + len(answer) :]]
        prompt, said, end = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts)
        if len(ids) + len(prompt) + len(said) + len(end) > room:
            break
        ids += [*prompt, *said, *end]
        ends = bool(end) and end[0] in controls
        targets += [False] * len(prompt) + [True] * len(said)
        targets += [ends and place == 0 for place in range(len(end))]
        before = whole
    return ids, targets
