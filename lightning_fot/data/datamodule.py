"""The LightningDataModule that feeds crossbatch training.

Annotations are plain (not postponed): the command line reads them, and the Args below are its ``--help``.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_fot.config.data import DataConfig
from lightning_fot.config.sources import FOR_TEXT, read_sources
from lightning_fot.data.feeds import Feed, MixtureFeed, PathsFeed
from lightning_fot.data.rows.loader import Batch, RowLoader, TrainPosition, to_tensors
from lightning_fot.data.rows.plan import BatchSequence, RowPlan
from lightning_fot.data.rows.sequences import Specials
from lightning_fot.data.text.documents import Corpus, Document, Item
from lightning_fot.data.text.readers import find_documents
from lightning_fot.data.text.selection import SelectionSettings
from lightning_fot.data.text.tokens import TextEncoder, Vocabulary, default_cache_dir
from lightning_fot.errors import SettingError

# Encoded before training starts, so that progress is seen; what training needs beyond is encoded as it goes.
_TOKENS_AHEAD = 2 * 1024 * 1024


class CrossbatchDataModule(pl.LightningDataModule):
    """Documents as rows of crossbatch training; each row reads on where it stopped in the batch before.

    Batches are dicts: ``input_ids`` and ``targets``, both int64 (batch_size, window), targets -100 where nothing is
    predicted; layout ``paper`` adds ``previous_ids`` int64 (batch_size, prev_windows, window) and ``previous_valid``
    bool (batch_size, prev_windows), oldest window first. Batch t is a pure function of the settings and t, so a run
    that was stopped goes on with the batch that would have come. In distributed training each rank takes its own rows;
    near the end of an epoch some rows, or all of a rank's, may be without targets. With ``sources``, documents of
    several sources are mixed by weight, and never is one read in two rows at once.

    Args:
        paths: Files and folders to read: .txt, .md, source code (the files of one folder are one document) and .jsonl
            (a line is a document); null takes the running Python's standard library, a package being one document.
        tokenizer: Backbone whose tokenizer is used; the command line sets it from model.backbone.
        window: Tokens of a row; the command line sets it from model.memory.window.
        layout: packed, paper or previous_window; the command line sets it from model.crossbatch.layout.
        batch_size: Rows of a batch on each device; a multiple of pack but in layout paper.
        pack: Rows that are consecutive windows of one document; the command line sets it from model.crossbatch.pack.
        prev_windows: Windows before each row that come along with layout paper; set from model.crossbatch.w.
        heldout_fraction: Share of the documents that training never sees. They are drawn with the seed so that short
            and long ones are among them. A single document is split by position.
        heldout: Files and folders of held-out documents; null takes them out of paths.
        min_tokens: Documents with fewer tokens are left out; null means window.
        max_documents: Documents used at most, drawn with the seed; null uses all.
        max_document_tokens: Tokens after which training and validation cut a document; null cuts none. What is
            evaluated is read whole.
        max_tokens: Tokens of training documents used at most; null uses all (they are encoded as they are needed).
        text_field: Key of the text in .jsonl objects.
        seed: Of the held-out draw and of the order of documents; epoch e is shuffled with seed + e.
        cache_dir: Folder for encoded text; null means lightning_fot/tokens in the user's cache folder.
        sources: A mixture, such as [{kind: text, paths: [books/], weight: 3}, {kind: passkey}]; its sources of kind
            text take paths, heldout and the like from above, where they have none of their own.
            Kinds: text, huggingface, dictionary, passkey, instructions; their keys are in lightning_fot.config.sources.
            It has no end, but for sources with passes: the trainer's max_steps ends the training.

    Raises:
        SettingError: A value is out of its range; from ``setup``: nothing to read, or too little of it.
    """

    def __init__(
        self,
        paths: list[str] | str | None = None,
        tokenizer: str = "smollm2-135m",
        window: int = 512,
        layout: Literal["packed", "paper", "previous_window"] = "packed",
        batch_size: int = 4,
        pack: int = 4,
        prev_windows: int = 1,
        heldout_fraction: float = 0.1,
        heldout: list[str] | str | None = None,
        min_tokens: int | None = None,
        max_documents: int | None = None,
        max_document_tokens: int | None = None,
        max_tokens: int | None = None,
        text_field: str = "text",
        seed: int = 0,
        cache_dir: str | None = None,
        sources: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        checked = DataConfig(
            paths, tokenizer, window, layout, batch_size, pack, prev_windows, heldout_fraction, heldout, min_tokens,
            max_documents, max_document_tokens, max_tokens, text_field, seed, cache_dir, sources,
        )  # fmt: skip
        self.paths = [paths] if isinstance(paths, str) else paths
        self.tokenizer = tokenizer
        self.window = window
        self.layout = layout
        self.batch_size = batch_size
        self.pack = checked.rows_of_a_text
        self.prev_windows = prev_windows
        self.heldout_fraction = heldout_fraction
        self.heldout = [heldout] if isinstance(heldout, str) else heldout
        self.min_tokens = checked.least_tokens
        self.max_documents = max_documents
        self.max_document_tokens = max_document_tokens
        self.max_tokens = max_tokens
        self.text_field = text_field
        self.seed = seed
        self.cache_dir = cache_dir
        self.sources = sources
        self.messages: list[str] = []
        self.report: Callable[[str], None] = rank_zero_info
        self._tokenizer_object: Any = None
        self._vocabulary = Vocabulary(tokenizer)
        self._feed: Feed | None = None
        self._marks: dict[int, str] = {}
        self._position = TrainPosition()

    @property
    def tokenizer_object(self) -> Any:
        """The tokenizer itself, loaded when first asked for; may be set to one that is loaded already."""
        if self._tokenizer_object is None:
            from lightning_fot.pretrained.backbones import backbone_config, check_backbone, load_tokenizer

            self._tokenizer_object = load_tokenizer(self.tokenizer)
            config = backbone_config(self.tokenizer)
            size = check_backbone(self.tokenizer).vocab_size or config.get("text_config", config).get("vocab_size")
            self._vocabulary = Vocabulary(self.tokenizer, size)
        return self._tokenizer_object

    @tokenizer_object.setter
    def tokenizer_object(self, tokenizer: Any) -> None:
        self._tokenizer_object = tokenizer

    def prepare_data(self) -> None:
        """Encode on one process what ``setup`` needs; the others then find it in the cache."""
        self._open()
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._encode_ahead()

    def setup(self, stage: str | None = None) -> None:
        """Find and split the documents; for ``fit`` also check that there is text for at least one batch.

        Raises:
            SettingError: No text, all documents too short, or fewer training tokens than one batch takes.
        """
        self._open()
        if stage == "fit":
            self._position.attach(self.trainer)
            self._encode_ahead()

    def train_dataloader(self) -> RowLoader:
        """Batches from where training stands (see ``state_dict``) to the end of the epoch, at each iteration."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        sequence = self._sequence(rank, self._world_size())
        return RowLoader(sequence, self._position)

    def val_dataloader(self) -> RowLoader:
        """Batches of the held-out documents, in the same form; every iteration is one whole pass."""
        feed, plan = self._open(), self._plan(self._world_size())
        rank = self.trainer.global_rank if self.trainer is not None else 0
        return RowLoader(BatchSequence(lambda epoch: feed.heldout(plan), plan, rank, self._world_size()), None)

    def test_dataloader(self) -> RowLoader:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    def train_batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Batch number ``step`` of a rank, wherever training stands."""
        self._open()
        sequence = self._sequence(rank, world_size)
        sequence.seek(step)
        return to_tensors(sequence.next())

    def current_documents(self, batches: int = 1) -> list[str]:
        """Names of the documents in this rank's rows of the batch that is being trained on, for error messages.

        Args:
            batches: How many batches to look at, the current one and those before it.

        Returns:
            Each name once. Documents that are made (passkeys, dictionaries) have none.
        """
        self._open()
        rank = self.trainer.global_rank if self.trainer is not None else 0
        sequence, now = self._sequence(rank, self._world_size()), self._position.consumed()
        found = [name for step in range(max(0, now + 1 - batches), now + 1) for name in sequence.names(step)]
        return list(dict.fromkeys(found))

    def heldout_documents(self, min_tokens: int | None = None, limit: int | None = None) -> list[Document]:
        """Documents that training never sees, in a seeded order.

        Args:
            min_tokens: Only documents with at least so many tokens.
            limit: Give at most so many; only these are encoded.

        Returns:
            Documents; none when no held-out document is so long.
        """
        return list(itertools.islice(self._open().heldout_documents(min_tokens or 1), limit))

    def other_documents(self, paths: Sequence[str] | None, setting: str) -> Iterator[Document]:
        """Held-out documents, or those of other files, encoded as those of the data, from each path in turn.

        Args:
            paths: Files and folders; None takes held-out documents.
            setting: Its name in errors.

        Raises:
            SettingError: A path is missing or holds no text.
        """
        if paths is None:
            yield from self._open().heldout_documents(1)
            return
        corpus = Corpus(self._encoder, 1)
        found = [find_documents([path], text_field=self.text_field, setting=setting).documents for path in paths]
        for turn in itertools.zip_longest(*found):
            for source in turn:
                if source is not None and (ids := corpus.ids(Item(source))) is not None:
                    yield Document(source.name, ids, self.tokenizer_object)

    def state_dict(self) -> dict[str, Any]:
        """How many batches training has completed, and a mark of the settings that decide them."""
        return {"batches": self._position.consumed(), "mark": self._mark()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were completed; warns when settings or documents have changed since."""
        self._position.restore(int(state_dict["batches"]))
        if state_dict["mark"] != self._mark():
            rank_zero_warn(
                "The documents or data settings are not those of the checkpoint: training goes on at the same batch "
                "number, but with other text than would have come."
            )

    def _open(self) -> Feed:
        """Find and split the documents, once."""
        if self._feed is None:
            if self.sources is not None:
                self._feed = MixtureFeed(
                    read_sources(self.sources),
                    {
                        name: getattr(self, name)
                        for name in ("min_tokens", "max_document_tokens", "heldout_fraction", "text_field", *FOR_TEXT)
                    },
                    self._encoder,
                    self.seed,
                    self._say,
                )
            else:
                settings = SelectionSettings(
                    self.paths,
                    self.heldout,
                    self.heldout_fraction,
                    self.max_documents,
                    self.max_tokens,
                    self.text_field,
                    self.seed,
                )
                self._feed = PathsFeed(settings, self.min_tokens, self.max_document_tokens, self._encoder, self._say)
        return self._feed

    @cached_property
    def _encoder(self) -> TextEncoder:
        folder = default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser()
        tokenizer = self.tokenizer_object
        return TextEncoder(tokenizer, folder, self._say, self._vocabulary)

    def _sequence(self, rank: int, world_size: int) -> BatchSequence:
        feed, plan = self._open(), self._plan(world_size)
        return BatchSequence(lambda epoch: feed.training(plan, epoch), plan, rank, world_size)

    def _plan(self, world_size: int) -> RowPlan:
        previous = self.prev_windows if self.layout == "paper" else 0
        pad = Specials.of(self.tokenizer_object).pad
        return RowPlan(self.batch_size * world_size, self.window, self.pack, previous, pad)

    def _encode_ahead(self) -> None:
        """Encode what training will read first, and check that a batch can be filled."""
        plan = self._plan(self._world_size())
        batch = plan.rows * plan.window
        batches = self._planned_batches()
        self._check_end(batches)
        wanted = max(batch, min((batches or 1) * batch, _TOKENS_AHEAD))
        self._open().prepare(plan, wanted, None if batches is None else batches * batch)

    def _check_end(self, batches: int | None) -> None:
        """Refuses a training that would never stop by itself."""
        trainer: Any = self.trainer  # typed by Lightning without its callbacks
        if batches is not None or trainer is None or not self._open().endless:
            return
        timed = any(isinstance(one, pl.callbacks.Timer) for one in trainer.callbacks)
        if not timed and not isinstance(trainer.limit_train_batches, int):
            raise SettingError(
                "trainer.max_steps", trainer.max_steps, "sets no end, and data.sources has none", "Set it."
            )

    def _planned_batches(self) -> int | None:
        """Batches that training takes; None when it is not limited by steps."""
        if self.trainer is None or self.trainer.max_steps <= 0:
            return None
        return int(self.trainer.max_steps) * int(self.trainer.accumulate_grad_batches)

    def _world_size(self) -> int:
        return int(self.trainer.world_size) if self.trainer is not None else 1

    def _mark(self) -> str:
        world_size = self._world_size()
        if world_size not in self._marks:
            settings = (
                *(self.window, self.layout, self.batch_size * world_size, self.pack, self.prev_windows, self.seed),
                *(self.min_tokens, self.max_document_tokens, self.max_tokens),
                self._open().mark,
            )
            self._marks[world_size] = hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
        return self._marks[world_size]

    def _say(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)
            self.report(message)
