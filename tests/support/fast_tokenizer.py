"""Small tokenizers of the library ``tokenizers``, made on the spot: byte-level BPE, and one like SentencePiece's."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "".join(
    f"def function_{number}(x):\n    return x + {number}\n\n\nSome words, and more words {number}.\nA line.\n"
    for number in range(400)
)
CONTROLS = ["<pad>", "<|im_start|>", "<|im_end|>"]


def byte_level(chat_template: str | None = CHATML) -> Any:
    """Byte-level BPE as GPT-2's; ``<|im_end|>`` ends a text, and nothing starts it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROLS,
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def sentence_piece(chat_template: str | None = None) -> Any:
    """BPE over the whole text, a space before it and spaces as ▁, as Llama 2's."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    # Trained line by line, so that no token reaches over a line end; line ends come in as lines of their own.
    raw.train_from_iterator([*TEXT.splitlines(), "\n", "\n\n", "字"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
