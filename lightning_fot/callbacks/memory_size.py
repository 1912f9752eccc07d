"""``MemorySize``: what a memory takes, during training."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from lightning_fot.callbacks.sampled import SampledCallback
from lightning_fot.training.module import FocusedTransformer


class MemorySize(SampledCallback):
    """Logs the size of the memory of a batch's text, and of the process.

    The first stream of the batch is read into a memory of its own with the configured retriever. Keys:
    ``memory/text_tokens`` (pairs of a layer and KV head), ``memory/bytes`` (keys, values, index and the log of tokens
    of all memory layers), ``memory/bytes_a_token``, ``memory/index_bytes_a_token`` (a part of the latter; 0 where the
    text is too short for an index), ``memory/process_peak_bytes`` (of RAM since the process began), and on a GPU
    ``memory/device_peak_bytes`` since the measurement before.

    Args:
        every_n_steps: Optimiser steps between measurements in training; 0 measures at validation and test alone.
        max_share: Of the time of ``fit``; None measures every time.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[MemorySize(every_n_steps=50)], logger=False, accelerator="cpu")
    """

    def measure(self, module: FocusedTransformer, batch: dict[str, Tensor]) -> dict[str, float]:
        """Reads the first pack or row of the batch."""
        lm, config = module.lm, module.crossbatch_config
        values: dict[str, float] = {}
        if lm.device.type == "cuda":
            values["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(lm.device))
            torch.cuda.reset_peak_memory_stats(lm.device)
        text = batch["input_ids"][: config.rows_of_a_text].reshape(1, -1)
        memory = lm.ingest(text, lm.new_memory(1))
        memory.flush()
        index = sum(layer.retriever.nbytes for layer in memory.layers.values())
        return values | {
            "memory/text_tokens": float(len(memory)),
            "memory/bytes": float(memory.nbytes),
            "memory/bytes_a_token": memory.nbytes / max(1, len(memory)),
            "memory/index_bytes_a_token": index / max(1, len(memory)),
            # Kibibytes, but for macOS.
            "memory/process_peak_bytes": float(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            ),
        }
