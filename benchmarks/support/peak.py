"""Section d: what each way of keeping a text takes, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from support.bench import Bench, Fills, Settings
from support.report import Report, Row, table
from support.rivals import ROOM, FullCache, greedy
from support.timing import GIB, Stamps, available_bytes, fits

ANSWER = "PEAK "
TITLE = "d. Memory above the loaded model (MiB), and bytes a token"
NOTES = """\
  build: highest while the memory was filled and its index built; held: afterwards; decode: highest while decoding.
  key, value, index, log: bytes a token that the memory says it holds; spare: allocated room;
    rss: as the system sees it."""
COLUMNS = {
    "tokens": "tokens",
    "method": "method",
    "build_mib": "build",
    "held_mib": "held",
    "decode_mib": "decode",
    "key": "key",
    "value": "value",
    "spare": "spare",
    "index": "index",
    "log": "log",
    "rss": "rss B/token",
    "over_full": "less than full",
}
_MIB = 1 << 20


def measure_peak(bench: Bench, sizes: tuple[int, ...]) -> list[Row]:
    """One process for each retriever and for full caches; each goes through the sizes."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.safetensors"
        bench.pairs.save(file)
        methods = ("static", "dynamic", *bench.settings.retrievers)
        # A quick run only shows that it works.
        for method in ("static,exact",) if bench.settings.quick else methods:
            bench.report.progress(f"d: {method}, in a process of its own")
            asked = {**bench.settings.as_row(), "pairs": str(file), "save_pairs": None, "tokens": sizes}
            script = Path(__file__).resolve().parents[1] / "attention.py"
            command = [sys.executable, str(script), "--peak-child", method]
            done = subprocess.run([*command, json.dumps(asked)], capture_output=True, text=True, check=False)
            answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
            if done.returncode or not answers:
                raise RuntimeError(f"measuring the memory of {method} failed:\n{done.stderr[-2000:]}")
            rows += json.loads(answers[-1].removeprefix(ANSWER))
    full = {row["tokens"]: row["rss"] for row in rows if row["method"] == "full cache, static" and "rss" in row}
    for row in rows:
        if row["tokens"] in full and row.get("rss"):
            row["over_full"] = full[row["tokens"]] / row["rss"]
    rows.sort(key=lambda row: row["tokens"])
    bench.report.add("d", rows)
    table(TITLE, COLUMNS, rows)
    print(NOTES, "\n", flush=True)
    return rows


@torch.no_grad()
def peak_child(methods: str, asked: dict[str, Any]) -> list[Row]:
    """The child process: loads the model, then fills and decodes while the system counts.

    Args:
        methods: One, or several with commas between: then later ones may use room that earlier ones gave back.
        asked: Settings.
    """
    for name in ("sections", "tokens", "retrievers", "layers"):
        asked[name] = tuple(asked[name])
    settings = Settings(**{**asked, "pairs": Path(asked["pairs"])})
    torch.set_num_threads(settings.threads)
    bench = Bench(settings, Report(None, {}))
    return [row for method in methods.split(",") for row in _rows(bench, method)]


def _rows(bench: Bench, method: str) -> list[Row]:
    settings = bench.settings
    prompt = bench.ids[:, : settings.window // 4]
    bench.pairs  # noqa: B018 - loaded before counting begins
    if method in ("static", "dynamic"):
        greedy(bench.bare, prompt, 4, Stamps())
        base = status("VmRSS")
        return [_full_row(bench, method, size, base) for size in settings.tokens]
    with bench.attached() as lm:
        greedy(lm, prompt, 4, Stamps(), memory=lm.new_memory())
        # Cells are made before counting: they belong to the benchmark.
        next(bench.pairs.blocks(bench.pairs.recorded, bench.pairs.recorded + 1))
        base = status("VmRSS")
        fills = Fills(bench, lm, (method,))
        rows = []
        for size in settings.tokens:
            reset_peak()
            fills.grow(size)
            if method not in fills.memories:
                rows.append({"tokens": size, "method": method, "skipped": "does not fit"})
                break
            memory = fills.memories[method]
            build, held = status("VmHWM") - base, status("VmRSS") - base
            reset_peak()
            greedy(lm, prompt, 6, Stamps(), memory=memory)
            row = {
                "tokens": size,
                "method": method,
                "build_mib": build / _MIB,
                "held_mib": held / _MIB,
                "decode_mib": (status("VmHWM") - base) / _MIB,
                "rss": held / size,
                **_held(memory),
            }
            rows.append(row)
        return rows


def _full_row(bench: Bench, kind: str, size: int, base: int) -> Row:
    name = f"full cache, {kind}"
    need = FullCache.nbytes(bench.bare, size + ROOM) * (1 if kind == "static" else 2)
    if not fits(need):
        return {"tokens": size, "method": name, "skipped": f"{need / GIB:.1f} of {available_bytes() / GIB:.1f} GiB"}
    reset_peak()
    cache = FullCache(bench.bare, size)
    held = status("VmRSS") - base
    cache.steps(kind, 100, 2)
    return {
        "tokens": size,
        "method": name,
        "held_mib": held / _MIB,
        "decode_mib": (status("VmHWM") - base) / _MIB,
        "rss": held / size,
    }


def _held(memory: Any) -> Row:
    """Bytes a token that a memory says it holds."""
    count, item = len(memory), memory.shape.dtype.itemsize
    key = sum(heads * dim * item for heads, dim in zip(memory.shape.kv_heads, memory.shape.head_dim, strict=True))
    value = sum(heads * dim * item for heads, dim in zip(memory.shape.kv_heads, memory.shape.value_dim, strict=True))
    index = sum(layer.retriever.nbytes for layer in memory.layers.values()) / count
    log = getattr(getattr(memory, "log", None), "nbytes", 0) / count
    spare = memory.nbytes / count - key - value - index - log
    return {"key": key, "value": value, "index": index, "log": log, "spare": spare}


def status(field: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Lets ``VmHWM`` begin again from what is in use now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
