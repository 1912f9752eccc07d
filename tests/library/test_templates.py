"""Chat templates of others: what they refuse, leave out or cannot do is told, with the way round."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_fot.errors import SettingError
from lightning_fot.library.answering import Answerer, AnswerSettings
from lightning_fot.pretrained import load_tokenizer

_PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


class _Model:
    """What an answerer looks at before it generates."""

    class model:
        generation_config = None


def _prompt(template: Any) -> str:
    tokenizer: Any = load_tokenizer("tiny-random-llama")
    tokenizer.chat_template = template
    answerer = Answerer(_Model(), tokenizer, None, AnswerSettings())  # type: ignore[arg-type]
    return str(tokenizer.decode(answerer._prompt("When does it open?")))


@pytest.mark.parametrize(
    "template",
    [
        {"tool_use": "{{ messages[0].content }}", "rag": "{{ messages[0].content }}"},
        "{{ raise_exception('only tools') }}",
        "{% if %}",
        "{{ messages + 1 }}",
        "{# #}",
        "<user>",
    ],
)
def test_a_template_that_does_not_ask_the_question_is_refused(template: Any) -> None:
    with pytest.raises(SettingError, match=r"chat template.*Add --raw"):
        _prompt(template)


def test_templates_that_want_text_and_those_that_want_parts_are_both_served() -> None:
    assert _prompt("[{{ messages[0].content }}]") == "[When does it open?]"
    assert _prompt(_PARTS) == "<user>When does it open?"
    # An empty template is none.
    assert _prompt("") == "When does it open?"
