"""A tokenizer of bytes with a start and an end token, so that ids can be read in tests."""

from __future__ import annotations

from typing import Any

PAD, BOS, EOS, FIRST = 0, 1, 2, 3


class ByteTokenizer:
    """Byte b is token b + 3. With ``prefix`` it marks the start of each text, as SentencePiece tokenizers do."""

    pad_token_id, bos_token_id, eos_token_id = PAD, BOS, EOS

    def __init__(self, prefix: bool = False) -> None:
        self.prefix = prefix
        self.characters = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        self.characters += len(text)
        ids = [byte + FIRST for byte in (" " * self.prefix + text).encode()]
        return {"input_ids": [BOS, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], **_: Any) -> str:
        # A model may have more tokens than there are bytes.
        return bytes(token - FIRST for token in ids if FIRST <= token < FIRST + 256).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {f"{self.prefix}{number}": number for number in range(256 + FIRST)}
