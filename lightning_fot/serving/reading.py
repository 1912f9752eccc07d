"""What changes a memory while it is asked: one thread reads and forgets, and shows whole documents when they are saved.

Others may write into the folder between two changes: the lock of the library is held for one at a time. What they have
saved is looked for, and shown too.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_fot.errors import SettingError
from lightning_fot.library.changes import Changes, Replacement, Unread
from lightning_fot.library.forget import forget
from lightning_fot.library.inbox import Inbox
from lightning_fot.library.ingest import Reader
from lightning_fot.library.library import BusyError, Entry
from lightning_fot.serving.metrics import Metrics
from lightning_fot.serving.requests import ApiError
from lightning_fot.serving.shelf import Job, Shelf
from lightning_fot.system.progress import JobProgress
from lightning_fot.system.signals import StopGuard, Stopped

if TYPE_CHECKING:
    from lightning_fot.model.lm import MemoryLM

# Between two looks at what other processes have saved, and two tries to get at a folder that another one writes to.
WATCH_S = 1.0
# Loading what others have saved may take this share of the time.
_LOAD_SHARE = 0.1
# Texts kept in the list that turned out to be those of documents with another name.
_MOST_KNOWN = 100


@dataclass(eq=False)
class _Forgetting:
    """A name that is to be forgotten, and who is told when it is."""

    name: str
    found: bool
    told: Future[bool] = field(default_factory=Future)


class Reading:
    """Reads documents into a memory, and forgets them, one after the other.

    Args:
        lm: The model.
        tokenizer: Its tokenizer; it is copied.
        shelf: The memory, with a library.
        metrics: Counts.
        most: Texts that may wait, those that failed included.
    """

    def __init__(self, lm: MemoryLM, tokenizer: Any, shelf: Shelf, metrics: Metrics, most: int) -> None:
        assert shelf.library is not None
        self.shelf = shelf
        self._library = shelf.library
        self._lm = lm
        # Tokenizers are not made for threads.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._metrics = metrics
        self._most = most
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._coming = 0
        self._forgettings: list[_Forgetting] = []
        self._stopping = False
        self._inbox: Inbox | None = None
        self.problem: str | None = None
        """Why what the folder holds now is not shown, or nothing can be added."""
        # Only the thread below touches these.
        self._memory = shelf.memory
        # Of what is half forgotten, the shelf has a part only.
        half = any(entry.leaving for entry in self._library.documents)
        self._stamp: Any = None if half else shelf.stamp
        self._look_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"documents of {shelf.name}", daemon=True)

    def start(self) -> None:
        """Begins; texts that an earlier server has left are read first."""
        try:
            self.open()
        except BusyError:
            pass  # Another server takes the documents; this one shows them.
        except SettingError as error:
            self.problem = str(error)
        self._thread.start()

    def stop(self) -> None:
        """Comes to an end after the window that is read. Returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Waits for the end that :meth:`stop` asked for."""
        if self._thread.is_alive():
            self._thread.join()
        if self._inbox is not None:
            self._inbox.close()

    def open(self) -> Inbox:
        """Where texts wait, once it is this process's.

        Raises:
            SettingError: It is another one's, or cannot be written.
        """
        with self._changed:
            if self._inbox is None:
                self._inbox = Inbox(self._library.path)
                self._jobs += [Job(handed) for handed in self._inbox.waiting]
                self._notify()
            return self._inbox

    def reserve(self) -> None:
        """Keeps a place for a text that comes; :meth:`release` gives it back.

        Raises:
            ApiError: There is none.
        """
        with self._changed:
            if self._stopping:
                raise ApiError(503, "The server is stopping.", code="stopping")
            held = self._coming + sum(job.state != "known" for job in self._jobs)
            if held >= self._most:
                raise ApiError(
                    429, f"{held} documents are waiting already. Try again when some have been read, or forget some of "
                    "them.", code="queue_full",
                )  # fmt: skip
            self._coming += 1

    def release(self) -> None:
        """Gives a place back."""
        with self._changed:
            self._coming -= 1

    def add(self, part: Path, name: str, digest: str, tokens: int) -> Job:
        """Takes a text to be read; when this returns it is kept.

        Args:
            part: A file that the inbox gave.
            name: What it is to be called: a document of that name is replaced.
            digest: SHA-256 of its text.
            tokens: How many it has.

        Raises:
            SettingError: It cannot be kept.
        """
        inbox = self.open()
        with self._changed:
            coming = [one for one in self._jobs if one.handed.name == name and one.state in ("waiting", "reading")]
            # Of several versions of a document the last one counts.
            if coming and coming[-1].handed.digest == digest and not coming[-1].cancelled:
                return coming[-1]
        job = Job(inbox.add(part, name, digest, tokens))
        with self._changed:
            earlier = [one for one in self._jobs if one.handed.name == name and one.state != "reading"]
            for one in earlier:
                one.cancelled = True
            self._jobs = [one for one in self._jobs if one not in earlier] + [job]
            self._notify()
        for one in earlier:
            inbox.remove(one.handed)
        return job

    def jobs(self) -> list[Job]:
        """Texts that are no documents yet, or not those that were meant."""
        with self._changed:
            return [copy.copy(job) for job in self._jobs]

    def forget(self, name: str) -> Future[bool]:
        """Forgets the document of a name, and texts that were to become it.

        Returns:
            Whether there was any, once it is sure that it will not come back.
        """
        with self._changed:
            if self._stopping:
                raise ApiError(503, "The server is stopping.", code="stopping")
            mine = [job for job in self._jobs if job.handed.name == name]
            for job in mine:
                job.cancelled = True
            one = _Forgetting(name, bool(mine))
            self._jobs = [job for job in self._jobs if job not in mine or job.state == "reading"]
            self._forgettings.append(one)
            self._notify()
        if self._inbox is not None:
            for job in mine:
                self._inbox.remove(job.handed)
        return one.told

    def _notify(self) -> None:
        self._metrics.set("fot_documents_waiting", self._waiting(), memory=self.shelf.name)
        self._changed.notify_all()

    def _waiting(self) -> int:
        return sum(job.state in ("waiting", "reading") for job in self._jobs)

    def _run(self) -> None:
        # What a kill has left half forgotten.
        due = any(entry.leaving for entry in self._library.documents)
        while True:
            with self._changed:
                self._notify()
                job = next((job for job in self._jobs if job.state == "waiting"), None)
                due = due or job is not None or bool(self._forgettings)
                if not (due or self._stopping):
                    self._changed.wait(WATCH_S)
                if self._stopping:
                    break
            try:
                if due:
                    due = False
                    self._change(job)
                elif time.monotonic() >= self._look_at and self._library.stamp() != self._stamp:
                    self._load()
            except Exception as error:
                self._failed(job, error)
        self._refuse(ApiError(503, "The server is stopping.", code="stopping"))

    def _load(self) -> None:
        """Takes what the folder holds now."""
        began = time.monotonic()
        stamp = self._library.stamp()
        if not stamp:
            raise SettingError("MEMORY", str(self._library.path), "is gone", "Put it back, or end this server.")
        self._library.refresh()
        self._memory = self._library.load(self._lm)
        self._show()
        self._stamp, self.problem = stamp, None
        self._look_at = time.monotonic() + (time.monotonic() - began) / _LOAD_SHARE

    def _show(self) -> None:
        """What is asked from now on; what is being forgotten is left out."""
        # Whoever waits should wait here, not the next who asks.
        self._memory.flush()
        self.shelf.show(self._memory, self._library.documents)

    def _change(self, job: Job | None) -> None:
        try:
            with self._library.locked():
                if self._library.stamp() != self._stamp:
                    self._load()
                self._forget_asked()
                if job is not None and not job.cancelled:
                    self._read(job)
                self._stamp = self._library.stamp()
        except BusyError as error:
            if job is not None:
                job.detail = f"{error.problem}"
            self._refuse(ApiError(409, "Another process is writing to this memory. Try again.", code="memory_busy"))
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, WATCH_S)
        finally:
            if job is not None and job.cancelled:
                self._end(job)

    def _failed(self, job: Job | None, error: Exception) -> None:
        # Nobody knows what state all is in: it is taken from the disk again.
        self._stamp = None
        self._look_at = time.monotonic() + WATCH_S
        text = f"{type(error).__name__}: {error}" if not isinstance(error, SettingError) else str(error)
        if job is None:
            self.problem = text
        else:
            job.state, job.detail = "failed", text
        self._refuse(ApiError(500, f"It could not be forgotten ({text}).", code="memory_failed"))

    def _refuse(self, error: ApiError) -> None:
        with self._changed:
            refused, self._forgettings = self._forgettings, []
        for one in refused:
            one.told.set_exception(error)

    def _forget_asked(self) -> None:
        """Forgets what is wanted, and what a kill had left half forgotten."""
        with self._changed:
            asked = list(self._forgettings)
        entries = [entry for entry in self._library.documents if entry.leaving]
        for one in asked:
            entry = self._library.named(one.name)
            if entry is not None and entry not in entries:
                entries.append(entry)
                one.found = True
        if entries:
            forget(self._library, self._memory, entries)
            self._show()
        self._tell(asked)

    def _tell(self, asked: list[_Forgetting]) -> None:
        with self._changed:
            self._forgettings = [one for one in self._forgettings if one not in asked]
        for one in asked:
            one.told.set_result(one.found)

    def _read(self, job: Job) -> None:
        library, handed = self._library, job.handed
        job.state, job.detail = "reading", None
        former = library.named(handed.name)
        outdated = [] if former is None or former.digest == handed.digest else [former]
        known = library.find(handed.digest)
        if known is not None and known.done:
            forget(library, self._memory, outdated)
        elif not self._read_text(job, outdated):
            return
        leaving = [entry for entry in library.documents if entry.leaving]
        forget(library, self._memory, leaving)
        self._show()
        if known is not None and known.done and known.name != handed.name:
            job.detail = known.name
        self._end(job)

    def _read_text(self, job: Job, outdated: list[Entry]) -> bool:
        """Reads a text to its end, unless nobody wants it any more or the server stops."""
        assert self._inbox is not None
        source = self._inbox.source(job.handed)
        guard = _Between(lambda: self._between(job, reader))
        quiet = JobProgress(console=Console(quiet=True))
        reader: Reader = Reader(self._lm, self._tokenizer, self._library, quiet, guard, memory=self._memory)
        self._memory = reader.memory
        try:
            unread = [Unread(source, job.handed.digest, (source.place,))]
            replaced = [Replacement(tuple(outdated), tuple(unread))] if outdated else []
            reader.read(Changes(unread, outdated, replaced))
            if not reader.documents:
                raise SettingError("document", job.handed.name, f"cannot be read any more ({reader.skipped.text()})",
                                   "Send it again.")  # fmt: skip
        except Stopped:
            job.state = "waiting"
            return False
        finally:
            self._memory = reader.memory
            self._metrics.add("fot_document_tokens_total", reader.tokens)
        return True

    def _between(self, job: Job, reader: Reader) -> None:
        """Between two windows: what cannot wait for the end of a document."""
        job.read = sum(document.tokens for document in reader.memory.log.find(reader.name))
        with self._changed:
            asked = list(self._forgettings)
            if self._stopping or job.cancelled:
                raise Stopped(signal.SIGTERM)
        marked = []
        for one in asked:
            entry = self._library.named(one.name)
            if entry is not None and entry.name == reader.name:
                # What is being read was begun under another name.
                job.cancelled = True
                raise Stopped(signal.SIGTERM)
            if entry is not None and not entry.leaving:
                entry.leaving = one.found = True
                self._library.changed(entry)
                marked.append(entry)
        if marked:
            # From here on it is forgotten, whatever is killed: see library. Its pairs go after this document.
            self._library.write(durable=True)
            self.shelf.show(self.shelf.memory, self._library.documents)
        if asked:
            self._tell(asked)

    def _end(self, job: Job) -> None:
        """A text has been read, or is not wanted any more."""
        if self._inbox is not None:
            self._inbox.remove(job.handed)
        with self._changed:
            self._jobs = [one for one in self._jobs if one is not job]
            job.state = "ready"
            if job.detail is not None and not job.cancelled:
                job.state = "known"
                known = [one for one in self._jobs if one.state == "known"]
                for one in known[: len(known) + 1 - _MOST_KNOWN]:
                    self._jobs.remove(one)
                self._jobs.append(job)
            self._notify()


class _Between(StopGuard):
    """Has something done wherever a reader could be stopped."""

    def __init__(self, between: Any) -> None:
        super().__init__(lambda text: None)
        self._call = between

    def check(self) -> None:
        """Between two windows."""
        self._call()
