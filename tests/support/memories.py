"""Small documents, a tiny model, and what a memory on disk holds: for the tests of ingest and ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fot.library.library import Library

# Exact search: what is found does not depend on when an index was built.
SETTINGS = (
    "--config=smoke",
    "--model.memory.window=32",
    "--model.memory.retriever=exact",
    "--model.memory.top_k=8",
)


def text(number: int, words: int = 40) -> str:
    return " ".join(f"word{(number * 7 + place * place) % 97}" for place in range(words))


def books(folder: Path, count: int, words: int = 40) -> Path:
    """A folder of so many documents, each a little longer than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"book{number}.txt").write_text(text(number, words + 5 * number), encoding="utf-8")
    return folder


@dataclass
class Contents:
    """What a memory on disk holds, and what the model predicts beside it."""

    documents: list[tuple[str | None, int, int, list[int]]]
    pairs: dict[str, Tensor]
    logits: Tensor
    listed: list[tuple[str, int | None]]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Contents)
        return (
            self.documents == other.documents
            and self.listed == other.listed
            and self.pairs.keys() == other.pairs.keys()
            and all(torch.equal(self.pairs[name], other.pairs[name]) for name in self.pairs)
            and torch.equal(self.logits, other.logits)
        )


def contents(folder: Path) -> Contents:
    """Opens a memory with the library's own model."""
    library = Library.read(folder)
    from lightning_fot.training.opening import open_model

    lm, _ = open_model(library.model)
    memory = library.load(lm)
    documents = [
        (one.name, one.tokens, one.stored, memory.log.tokens(one.number, 0, one.tokens).tolist())
        for one in memory.documents
    ]
    pairs: dict[str, Tensor] = {}
    for number, layer in memory.layers.items():
        pairs[f"{number}.keys"], pairs[f"{number}.values"] = layer.keys, layer.values
    with torch.no_grad():
        logits = lm(torch.arange(10, 40)[None], memory=memory).logits
    return Contents(documents, pairs, logits, [(one.name, one.tokens) for one in library.documents])


def backbone(folder: Path, seed: int | None = None, template: str | None = None) -> Path:
    """The tiny model as a folder with a tokenizer of bytes.

    Args:
        folder: Where.
        seed: Draw other weights for its first layer.
        template: Chat template of the tokenizer.
    """
    from lightning_fot.pretrained import load_backbone, load_tokenizer

    model: Any = load_backbone("tiny-random-llama")
    if seed is not None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    model.save_pretrained(folder)
    tokenizer = load_tokenizer("tiny-random-llama")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
