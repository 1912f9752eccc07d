"""``lightning doctor``: versions, threads, devices, who owns the script name, and a short self-test."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lightning_fot
from lightning_fot.commands.script import OPT_OUT, find_other
from lightning_fot.request.words import Verb, read
from lightning_fot.system.environment import cores, installed, processor


def script_owner() -> str:
    """Who owns the script ``lightning``, in a sentence."""
    found = shutil.which("lightning")
    other = find_other()
    beside = f"; other commands go to {other.dist.name if other.dist else other.value}" if other is not None else ""
    opted_out = os.environ.get(OPT_OUT, "") not in ("", "0")
    if found is None:
        return "not on PATH (use lightning-fot or python -m lightning_fot)"
    try:
        ours = "lightning_fot" in Path(found).read_text(encoding="utf-8", errors="replace")
    except OSError:
        ours = False
    if not ours:
        return f"{found}: another distribution's (use lightning-fot; reinstall lightning-fot last to change it)"
    return f"{found}: lightning-fot's{beside}" + (f"; switched off by {OPT_OUT}" if opted_out else "")


def self_test() -> tuple[bool, str]:
    """A tiny model reads a text into memory and must give what one pass gives.

    Returns:
        Whether it passed, and a sentence.
    """
    import torch

    from lightning_fot.config.memory import MemoryConfig
    from lightning_fot.model.attach import attach_memory
    from lightning_fot.pretrained.backbones import load_backbone

    began = time.perf_counter()
    model = load_backbone("tiny-random-llama")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        plain = model(ids[:, :16]).logits
        lm = attach_memory(model, MemoryConfig(memory_layers=[1, 3], window=16, top_k=64, retriever="exact"))
        empty, whole = lm(ids[:, :16]).logits, lm(ids).logits
        memory = lm.new_memory()
        lm.ingest(ids[:, :48], memory=memory)
        chunked = lm(ids[:, 48:], memory=memory).logits
    assert empty is not None
    assert whole is not None
    assert chunked is not None
    same = float((empty - plain).abs().max())
    memory_error = float((chunked - whole[:, 48:]).abs().max())
    passed = same == 0.0 and memory_error < 1e-4 and len(memory) == 48
    seconds = time.perf_counter() - began
    detail = f"empty memory differs by {same:.1e}, memory in two reads by {memory_error:.1e}, {seconds:.1f} s"
    return passed, detail


def doctor(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Prints the report.

    Args:
        words: Words after ``doctor``: there are none.
        program: How it was called.
        debug: Not used: every verb is called alike.

    Returns:
        0, or 1 if the self-test fails.

    Raises:
        SettingError: There are words.
    """
    verb = Verb(program, about="Versions, threads, devices, who owns the script name, and a short self-test.")
    if read(words, verb).help:
        print(verb.help())
        return 0
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("lightning-fot", f"{lightning_fot.__version__} ({Path(lightning_fot.__file__).parent})")
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    table.add_row("system", f"{platform.platform()}, {processor()}")
    for name, number in installed().items():
        table.add_row(name, number or "not installed")
    table.add_row("script lightning", script_owner())

    import torch

    table.add_row("threads", f"{torch.get_num_threads()} of {cores()} cores")
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join(["cpu", *cuda]))
    from lightning_fot.evaluation.speed.limits import product_rate, read_rate

    rates = f"{read_rate('cpu') / 1e9:.1f} GB/s read, {product_rate('cpu', 64) / 1e9:.0f} GFLOP/s in products of a scan"
    table.add_row("memory", f"{rates}: the bounds that reports show beside measurements")
    from lightning_fot.retrievers import available_retrievers
    from lightning_fot.retrievers.keys import native

    missing = native.missing()
    table.add_row("search", f"in torch, several times slower: {missing}" if missing else "compiled")
    console.print(table)

    for name, info in available_retrievers().items():
        if not info.importable:
            console.print(f"retriever {name}: {info.error or 'cannot be imported'}. {info.install or ''}", markup=False)
    passed, detail = self_test()
    console.print(f"self-test: {'passed' if passed else 'FAILED'} ({detail})", markup=False, highlight=False)
    return 0 if passed else 1
