"""The section ``data`` of a configuration: the arguments of ``CrossbatchDataModule``. Standard library only."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_fot.config.sources import FOR_TEXT, check_taken, read_sources
from lightning_fot.errors import SettingError, check_at_least, check_choice

# A label that is no target: no loss counts it, as in torch and transformers.
IGNORED = -100


@dataclass
class DataConfig:
    """Each as the argument of ``CrossbatchDataModule`` of that name, whose docstring says what they mean.

    Raises:
        SettingError: A value is out of its range, or values do not fit each other.
    """

    paths: list[str] | str | None = None
    tokenizer: str = "smollm2-135m"
    window: int = 512
    layout: Literal["packed", "paper", "previous_window"] = "packed"
    batch_size: int = 4
    pack: int = 4
    prev_windows: int = 1
    heldout_fraction: float = 0.1
    heldout: list[str] | str | None = None
    min_tokens: int | None = None
    max_documents: int | None = None
    max_document_tokens: int | None = None
    max_tokens: int | None = None
    text_field: str = "text"
    seed: int = 0
    cache_dir: str | None = None
    sources: list[dict[str, Any]] | None = None

    @property
    def rows_of_a_text(self) -> int:
        """Consecutive rows of a batch that are consecutive windows of one document."""
        return 1 if self.layout == "paper" else self.pack

    @property
    def least_tokens(self) -> int:
        """Tokens that a document must have."""
        return self.window if self.min_tokens is None else self.min_tokens

    def __post_init__(self) -> None:
        for name in ("window", "batch_size", "pack", "prev_windows", "seed"):
            if getattr(self, name) is None:
                raise SettingError(f"data.{name}", None, "must be a whole number", "Leave it out for the default.")
        check_at_least("data", self, 1, "batch_size", "pack", "prev_windows", "max_documents")
        check_at_least("data", self, 2, "window", "min_tokens", "max_document_tokens", "max_tokens")
        check_at_least("data", self, 0, "seed")
        check_choice("data.layout", self.layout, ("packed", "paper", "previous_window"))
        if not 0 < self.heldout_fraction < 1:
            raise SettingError("data.heldout_fraction", self.heldout_fraction, "must be between 0 and 1", "Try 0.1.")
        if self.batch_size % self.rows_of_a_text:
            near = max(self.pack, self.batch_size // self.pack * self.pack)
            raise SettingError(
                "data.batch_size", self.batch_size, f"is not a multiple of pack={self.pack}", f"Try {near}."
            )
        if self.max_document_tokens is not None and self.max_document_tokens < self.least_tokens:
            raise SettingError(
                "data.max_document_tokens",
                self.max_document_tokens,
                f"is below the {self.least_tokens} tokens that a document must have",
                "Raise it, or lower data.min_tokens.",
            )
        if self.sources is not None:
            check_taken({name: getattr(self, name) for name in FOR_TEXT}, read_sources(self.sources))
