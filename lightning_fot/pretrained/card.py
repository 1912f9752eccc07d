"""The model card of a saved folder: ``README.md``, which the Hugging Face hub shows. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fot.system.digests import file_digest
from lightning_fot.system.files import write_text

CARD = "README.md"
# In the settings file of the folder: the digest of the card as it was written. One that differs is the user's own.
CARD_DIGEST = "card"
HINT = "lightning_fot.attach_pretrained(FOLDER)"
_SHOWN = ("memory_layers", "window", "overlap", "sink_tokens", "top_k", "retriever", "attending", "positions")


def write_card(folder: Path, base: str, memory: Mapping[str, Any], delta: bool = False) -> str:
    """Writes the card of a model, or of a delta.

    Args:
        folder: Where.
        base: The backbone; named as the model's base if it is a hub id, and never where it is a path.
        memory: Settings of the memory.
        delta: Whether the folder holds a difference from ``base`` alone.

    Returns:
        Digest of the card, to be kept as :data:`CARD_DIGEST`.
    """
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None and not Path(base).exists()
    head = ["library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [lightning-fot, focused-transformer, memory, long-context]"]
    head += [f"base_model: {base}"] * hub_id
    named = base if hub_id or re.fullmatch(r"[\w.-]+", base) else "its backbone"
    plain = (
        f"The folder holds what training changed in `{named}`, and no more: transformers alone cannot open it."
        if delta
        else "`AutoModelForCausalLM.from_pretrained` and `pipeline` open the same folder without the memory: the plain "
        "model, which reads no further than its own context."
    )
    rows = [f"| `{name}` | `{memory[name]}` |" for name in _SHOWN if memory.get(name) is not None]
    text = f"""---
{chr(10).join(head)}
---

# {"What was trained on " if delta else ""}{named if delta else "A model with a memory"}

Made with [lightning-fot](https://pypi.org/project/lightning-fot): a searchable memory of long documents in some layers
of a Llama-style model (Focused Transformer, [arXiv 2307.03170](https://arxiv.org/abs/2307.03170)).

## With its memory

```python
from lightning_fot import attach_pretrained  # pip install lightning-fot

lm = attach_pretrained("FOLDER")  # this folder
memory = lm.ingest(document_ids, lm.new_memory())  # (1, T) int64, any length
lm.generate(question_ids, memory, max_new_tokens=50)
```

On the command line: `lightning ingest NAME book.txt --model.backbone=FOLDER`, then `lightning ask NAME "…"`.

## Without it

{plain}

## Settings

| setting | value |
|---|---|
{chr(10).join(rows)}

Training data, measures and limits are for whoever trained it to add here.
"""
    write_text(folder / CARD, text)
    return file_digest(folder / CARD)


def is_own(folder: Path, said: Mapping[str, Any]) -> bool:
    """Whether the card of a folder is as :func:`write_card` made it.

    Args:
        folder: Where it is.
        said: What the settings file says.
    """
    file = folder / CARD
    return not file.is_file() or file_digest(file) == said.get(CARD_DIGEST)
