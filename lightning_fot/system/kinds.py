"""Every kind of file that the product writes: what a change in one is told by, and what happens then.

A new kind is added here. Tests write each kind, alter its bytes and read it, and find no file that is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath


class Digest(Enum):
    """Where the digest of a file is."""

    INSIDE = "in the file itself"
    NAMED = "in the settings file or index beside it"
    CRC = "a CRC-32 of each member of the archive"
    NONE = "nowhere"


class Then(Enum):
    """What happens where a file was altered."""

    REFUSED = "a SettingError names it"
    MADE_AGAIN = "it counts as missing, and is made again"
    BEGINNING = "a SettingError names it; of a file that was cut short the whole lines count, as after a kill"
    BELIEVED = "nothing"


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        name: For messages and tests.
        patterns: Ends of paths, as in ``PurePath.match``.
        digest: Where its digest is.
        then: What happens where it was altered.
        why: Why it has no digest, where it has none.
    """

    name: str
    patterns: tuple[str, ...]
    digest: Digest
    then: Then
    why: str = ""


_INSIDE, _NAMED = Digest.INSIDE, Digest.NAMED
_REFUSED, _AGAIN = Then.REFUSED, Then.MADE_AGAIN

KINDS = (
    Kind("index of a memory", ("memory.json",), _INSIDE, _REFUSED),
    Kind("pairs of a memory", ("memory-*.safetensors",), _NAMED, _REFUSED),
    Kind("log of a memory", ("log-*.safetensors",), _NAMED, _REFUSED),
    Kind("library", ("library.json",), _INSIDE, _REFUSED),
    Kind("journal of a library", ("library.journal",), _INSIDE, Then.BEGINNING),
    Kind("document that waits to be read", ("inbox/*.json",), _INSIDE, _REFUSED),
    Kind("text of such a document", ("inbox/*.text",), _NAMED, _REFUSED),
    Kind("piece of ids", ("*.piece",), _INSIDE, _AGAIN),
    Kind("document of ids", ("*.document",), _INSIDE, _AGAIN),
    Kind("checkpoint", ("*.ckpt",), Digest.CRC, _REFUSED),
    Kind("settings of a retriever", ("retriever.json",), _INSIDE, _REFUSED),
    Kind("keys of a retriever", ("keys.safetensors",), _INSIDE, _REFUSED),
    Kind("settings of a saved model", ("lightning_fot.json",), _INSIDE, _REFUSED),
    Kind(
        "saved model",
        (
            *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
            *("lightning_fot_gates.safetensors", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
            *("chat_template.jinja", "vocab.json", "merges.txt"),
        ),
        _NAMED,
        _REFUSED,
    ),
    Kind("settings of a delta", ("lightning_fot_delta.json",), _INSIDE, _REFUSED),
    Kind("delta", ("delta.safetensors",), _INSIDE, _REFUSED),
    Kind("adapter", ("adapter_model.safetensors",), _INSIDE, _REFUSED),
    Kind("sweep cell", ("cells/*.json",), _INSIDE, _AGAIN),
    Kind("recording of a sweep", ("recordings/*.safetensors",), _INSIDE, _AGAIN),
    Kind("end of a training", ("training.json",), _INSIDE, _AGAIN),
    Kind("finished phases of an evaluation", ("evaluation/partial.json",), _INSIDE, _AGAIN),
    Kind("results", ("results.json",), _INSIDE, _REFUSED),
    # After all others of its ending: recorded keys get their name from the user.
    Kind("recording", ("*.safetensors",), _INSIDE, _REFUSED),
    *(
        Kind(name, patterns, Digest.NONE, Then.BELIEVED, why)
        for name, patterns, why in (
            ("page, figure or table", ("*.html", "*.png", "*.csv"), "made for people, from results.json"),
            ("configuration", ("*.yaml",), "meant to be edited"),
            ("adapter settings", ("adapter_config.json", "README.md"), "peft's own; only peft reads them"),
            ("log", ("*.log", "events.out.*"), "made for people"),
            ("journal of a search", ("search.journal",), "Optuna's own"),
            ("lock or claim", (".lock", "*.claim", "search.journal.lock"), "holds nothing that lasts"),
        )
    ),
)


def kind_of(path: PurePath) -> Kind | None:
    """The kind of a file that the product wrote; None where it is none of these."""
    return next((kind for kind in KINDS if any(map(path.match, kind.patterns))), None)
