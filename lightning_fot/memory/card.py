"""The card of a saved memory: ``README.md``, which the Hugging Face hub shows. Standard library only."""

from __future__ import annotations

import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fot.system.files import write_text

CARD = "README.md"
# Digest of all other lines: a card that was edited is the user's own, and stays.
_SEAL = re.compile(r"<!-- lightning-fot: ([0-9a-f]{64}) -->\n")
_MOST_SHOWN = 50
_FACTS = ("model_type", "memory_layers", "positions", "dtype")


def write_card(
    folder: Path, fingerprint: Mapping[str, Any], lengths: Sequence[int], documents: Sequence[tuple[str | None, int]]
) -> None:
    """Writes the card of a memory, unless there is one that a user has edited.

    Args:
        folder: Where.
        fingerprint: Of the model that made the memory.
        lengths: Tokens stored in each row.
        documents: Name and tokens of each document.

    Raises:
        OSError: It cannot be written.
    """
    file = folder / CARD
    text = _card(fingerprint, lengths, documents)
    if os.path.lexists(file):
        if not file.is_file():
            # A folder, a pipe, a link that leads nowhere: somebody has put it there.
            return
        there = file.read_text(encoding="utf-8", errors="replace")
        if there == text or not _is_own(there):
            return
    write_text(file, text)


def _is_own(text: str) -> bool:
    """Whether a card is as it was written."""
    seal = _SEAL.search(text)
    return seal is not None and _digest(_SEAL.sub("", text, count=1)) == seal[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _card(fingerprint: Mapping[str, Any], lengths: Sequence[int], documents: Sequence[tuple[str | None, int]]) -> str:
    facts = [f"| `{name}` | `{fingerprint[name]}` |" for name in _FACTS if name in fingerprint]
    named = [(name, tokens) for name, tokens in documents if name is not None]
    shown = [f"| {_cell(name)} | {tokens:,} |" for name, tokens in named[:_MOST_SHOWN]]
    more = [f"| and {len(named) - _MOST_SHOWN:,} more | |"] if len(named) > _MOST_SHOWN else []
    table = ["| document | tokens |", "|---|---|", *shown, *more] if named else ["None has a name."]
    head = "---\nlibrary_name: lightning-fot\ntags: [lightning-fot, focused-transformer, memory]\n---\n"
    body = f"""
# A memory of {len(documents):,} document{"" if len(documents) == 1 else "s"}

{sum(lengths):,} tokens that a language model has read, as keys and values of its memory layers. Made with
[lightning-fot](https://pypi.org/project/lightning-fot) (Focused Transformer,
[arXiv 2307.03170](https://arxiv.org/abs/2307.03170)).

**It holds the text itself**: whoever has this folder can read the documents.

## Use

```python
memory = lm.load_memory("FOLDER")  # this folder; lm: the model that made it, see lightning_fot.attach_pretrained
lm.generate(question_ids, memory, max_new_tokens=50)
```

Only the model that made it can read it: others are refused.

| model | |
|---|---|
{chr(10).join(facts)}

## Documents

{chr(10).join(table)}
"""
    return f"{head}<!-- lightning-fot: {_digest(head + body)} -->\n{body}"


def _cell(name: str) -> str:
    """A name as text of a table: it may be anything that a user has typed."""
    said = html.escape("".join(letter if letter.isprintable() else " " for letter in name))
    return re.sub(r"[|`*_\[\]\\~$]", lambda found: f"&#{ord(found[0])};", said)
