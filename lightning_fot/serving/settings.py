"""How a server is set up: checked without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fot.errors import SettingError
from lightning_fot.request.api_key import check_key

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """What a server listens to and how much it takes on.

    Args:
        host: Address to listen at.
        port: Port; 0 takes a free one.
        api_key: What clients have to send as ``Authorization: Bearer``; None asks for nothing.
        max_batch: Answers generated side by side.
        max_queue: Answers that may wait for a place among them.
        max_prompt_tokens: Longest prompt, the chat template included.
        max_tokens: Longest answer; what a request gets that does not say.
        max_body_bytes: Largest request.
        max_document_bytes: Largest document that is uploaded.
        max_document_tokens: Longest one.
        max_documents_waiting: Uploaded documents that may wait to be read, for each memory.
        max_connections: Requests under way at once, and open connections as far as they ask for something.
        timeout: Seconds in which a client has to have sent its request.
        grace: Seconds in which answers are finished when the server is stopped.

    Raises:
        SettingError: A value cannot work, or the address can be reached by others and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_prompt_tokens: int = 8192
    max_tokens: int = 512
    max_body_bytes: int = 2**20
    max_document_bytes: int = 32 * 2**20
    max_document_tokens: int = 10_000_000
    max_documents_waiting: int = 64
    max_connections: int = 512
    timeout: float = 30.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise SettingError("port", self.port, "must be from 0 to 65535", "Try 8000.")
        least = {"max_queue": 0}
        for name in ("max_batch", "max_queue", "max_prompt_tokens", "max_tokens", "max_body_bytes", "max_connections",
                     "max_document_bytes", "max_document_tokens", "max_documents_waiting"):  # fmt: skip
            value, minimum = getattr(self, name), least.get(name, 1)
            if value < minimum:
                raise SettingError(name, value, f"must be at least {minimum}", "Correct it.")
        for name in ("timeout", "grace"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(name, getattr(self, name), "must be seconds above 0", "Try 30.")
        check_key(self.api_key)
        if self.api_key is None and self.host not in LOOPBACK:
            raise SettingError(
                "host", self.host, "can be reached by others, who could read and change the memories",
                "Give --api_key or --api_key_file, or leave --host out.",
            )  # fmt: skip
