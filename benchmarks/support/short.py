"""Section a: what a memory costs when it is not used: short input beside an empty memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from support.bench import Bench
from support.report import Row, table
from support.rivals import greedy
from support.timing import Stamps, interleave, ratio, timed

TITLE = "a. Empty memory: attached model over bare backbone (1 is equal; aim: at most 1.03)"


def measure_short(bench: Bench) -> list[Row]:
    """Calls and decoding with an empty memory, each against the bare backbone."""
    quick = bench.settings.quick
    lengths = (16, 64) if quick else (64, 256, 512)
    rounds = bench.settings.repeats * (1 if quick else 4)
    new_tokens = 8 if quick else 24
    rows: list[Row] = []
    with bench.attached(window=max(512, bench.settings.window)) as lm:
        for length in lengths:
            bench.report.progress(f"a: {length} tokens, {rounds} rounds")
            ids, empty = bench.ids[:, :length], lm.new_memory()
            methods = {
                "bare": timed(partial(bench.bare, ids, use_cache=False)),
                "lm(ids, memory=empty)": timed(partial(lm, ids, memory=empty)),
                "lm(ids)": timed(partial(lm, ids)),
                "model(ids) while attached": timed(partial(lm.model, ids, use_cache=False)),
            }
            seconds = interleave(methods, rounds)
            rows += [_row(f"{length} tokens", name, seconds) for name in methods if name != "bare"]
        bench.report.progress(f"a: decoding {new_tokens} tokens, {rounds} rounds")
        prompt = bench.ids[:, : lengths[0]]

        def decoding(model: Any) -> Callable[[], float]:
            return lambda: statistics.median(greedy(model, prompt, new_tokens, Stamps()).steps())

        seconds = interleave(
            {
                "bare": decoding(bench.bare),
                "lm.generate": decoding(lm),
                "model.generate while attached": decoding(lm.model),
            },
            rounds,
        )
        rows += [_row("one token", name, seconds) for name in seconds if name != "bare"]
    bench.report.add("a", rows)
    columns = {
        "what": "what",
        "method": "method",
        "ms": "ms",
        "bare_ms": "bare ms",
        "ratio": "ratio",
        "ratio_q1": "q1",
        "ratio_q3": "q3",
    }
    table(TITLE, columns, rows)
    return rows


def _row(what: str, name: str, seconds: dict[str, list[float]]) -> Row:
    return {
        "what": what,
        "method": name,
        "ms": 1e3 * statistics.median(seconds[name]),
        "bare_ms": 1e3 * statistics.median(seconds["bare"]),
        **ratio(seconds, name, "bare").as_dict("ratio"),
        "rounds": len(seconds[name]),
    }
