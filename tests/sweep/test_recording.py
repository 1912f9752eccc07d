"""Recorded keys and queries, held against those of the plain model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.bench import layer_of, load_metadata, load_qk, measure_retriever, scale_of
from lightning_fot.cli import main
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.recording import Recording, RecordSettings
from lightning_fot.model.lm import MemoryLM
from lightning_fot.pretrained import load_backbone
from lightning_fot.system.progress import JobProgress

WINDOW = 16


@pytest.fixture
def attached(request: pytest.FixtureRequest) -> Iterator[MemoryLM]:
    """Layer 0 is a memory layer: its keys and queries depend on the token alone."""
    given = getattr(request, "param", {})
    config = MemoryConfig(**{"memory_layers": [0, 2], "window": WINDOW, "top_k": 4, **given})
    with attach_memory(load_backbone("tiny-random-llama"), config) as lm:
        lm.eval()
        yield lm


@torch.no_grad()
def plain(lm: MemoryLM, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (G, T, D) and rotated queries (H, T, D) of layer 0, from the weights."""
    layer = lm.model.model.layers[0]  # type: ignore[union-attr,index]
    hidden = layer.input_layernorm(lm.model.get_input_embeddings()(ids))  # type: ignore[operator,union-attr]
    attention = layer.self_attn  # type: ignore[union-attr]
    dim = attention.head_dim  # type: ignore[union-attr]
    keys = attention.k_proj(hidden).unflatten(-1, (-1, dim)).transpose(0, 1)  # type: ignore[union-attr,operator]
    queries = attention.q_proj(hidden).unflatten(-1, (-1, dim)).transpose(0, 1)  # type: ignore[union-attr,operator]
    angles = places[:, None] / lm.model.config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    half = torch.cat([-queries[..., dim // 2 :], queries[..., : dim // 2]], dim=-1)
    return keys, queries * cos + half * sin


def among(wanted: Tensor, given: Tensor) -> bool:
    """Whether each row of ``wanted`` is a row of ``given``."""
    # The quicker way to distances, by products, loses the digits that are wanted here.
    distances = torch.cdist(wanted, given, compute_mode="donot_use_mm_for_euclid_dist")
    return bool((distances.min(dim=1).values < 1e-4).all())


def ids_of(count: int) -> Tensor:
    return torch.arange(3, 3 + count)[None]


@pytest.mark.parametrize(
    "attached", [{"skip_window_start": 1}, {"overlap": 4, "sink_tokens": 2}], indirect=True, ids=["skip", "overlap"]
)
def test_keys_and_queries_are_those_of_the_model(attached: MemoryLM) -> None:
    config = attached.config
    recording = Recording(attached, RecordSettings(tokens=96, past=10_000, queries=10_000, dtype="float32"))
    recording.held_back = 2
    ids = ids_of(200)
    recording.read(ids)
    found = recording.tensors()
    kept = config.sink_tokens + config.overlap
    order = torch.arange(recording.tokens)
    places = torch.where(order < WINDOW, order, kept + (order - WINDOW) % (WINDOW - kept))
    keys, queries = plain(attached, ids[0, : recording.tokens], places)
    groups = queries.unflatten(0, (len(keys), -1))
    stored = len(found["L0h0_keys"])
    if not kept:
        assert recording.done
        assert recording.tokens == 96 + 2 * WINDOW
        assert stored == 96 - 96 // WINDOW
        in_memory = [number for number in range(96) if number % WINDOW]
        torch.testing.assert_close(found["L0h1_keys"], keys[1, in_memory], rtol=0, atol=1e-5)
    for head in range(len(keys)):
        assert among(found[f"L0h{head}_keys"], keys[head])
        for kind in ("", "past_"):
            recorded, stands = found[f"L0h{head}_{kind}queries"], found[f"L0h{head}_{kind}positions"]
            for place in stands.unique():
                rotated = groups[head][:, places == place].flatten(0, 1)
                assert among(recorded[stands == place], rotated)
    # All queries were wanted: together they are those of every token and head of the group, each once.
    heads = groups.shape[1]
    assert len(found["L0h0_past_queries"]) + len(found["L0h0_queries"]) == heads * recording.tokens
    # The held-out ones are those of the last windows, none of whose keys is there.
    last = order >= recording.tokens - len(found["L0h0_queries"]) // heads
    assert among(found["L0h0_queries"], groups[0][:, last].flatten(0, 1))
    assert stored <= int((~last).sum())


def test_each_document_begins_a_window_and_a_sample_is_kept(attached: MemoryLM) -> None:
    recording = Recording(attached, RecordSettings(tokens=64, past=40, queries=25))
    for count in (24, 24, 400):
        recording.read(ids_of(count)[:, :240])
    assert recording.done
    found = recording.tensors()
    assert found["L0h0_keys"].dtype == torch.float16
    assert {name.partition("_")[0] for name in found} == {"L0h0", "L0h1", "L2h0", "L2h1"}
    assert len(found["L2h0_queries"]) == len(found["L2h0_positions"]) == 25
    assert 40 <= len(found["L2h0_past_queries"]) <= 50
    # 24 tokens are a window of 16 and one of 8: the keys kept begin with both documents, whole.
    keys, _ = plain(attached, ids_of(24)[0], torch.arange(24))
    for start in (0, 24):
        torch.testing.assert_close(found["L0h0_keys"][start : start + 24].float(), keys[0], rtol=0, atol=1e-2)


def test_what_was_read_when_it_was_stopped_is_a_recording(attached: MemoryLM) -> None:
    recording = Recording(attached, RecordSettings(tokens=10_000))
    with pytest.raises(SettingError, match="less than two windows"):
        recording.tensors()
    windows = 0

    def stop(tokens: int) -> None:
        nonlocal windows
        windows += 1
        if windows == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording.read(ids_of(200), stop)
    found = recording.tensors()
    assert len(found["L0h0_keys"]) == 3 * WINDOW
    assert set(found["L0h0_positions"].tolist()) == set(range(WINDOW))


def test_settings_are_checked(attached: MemoryLM) -> None:
    for name in ("tokens", "past", "queries"):
        with pytest.raises(SettingError, match=f"{name}=0"):
            RecordSettings(**{name: 0})
    with pytest.raises(SettingError, match="dtype='int8'"):
        RecordSettings(dtype="int8")
    attached.config.capacity = 100
    with pytest.raises(SettingError, match="drops keys"):
        Recording(attached, RecordSettings())


def test_a_dtype_that_cannot_hold_the_keys_is_refused(attached: MemoryLM) -> None:
    recording = Recording(attached, RecordSettings(tokens=64, past=8, queries=8))
    attached.model.model.layers[0].self_attn.k_proj.weight.data *= 1e7  # type: ignore[union-attr,index]
    recording.read(ids_of(400)[:, :250])
    with pytest.raises(SettingError, match="Record in float32"):
        recording.tensors()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"word{(7 * place + place * place) % 97}" for place in range(3000)), encoding="utf-8")
    return path


def words(book: Path, out: Path, *more: str) -> list[str]:
    settings = ["--config", "smoke", f"--data.paths=[{book}]", "--tokens", "1024", "--queries", "64", "--past", "100"]
    return ["bench", "--record", str(out), *settings, *more]


def test_the_command_records_what_bench_reads(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "qk.safetensors"
    assert main(words(book, out, "--model.memory.window", "32", "--dtype", "float32")) == 0
    assert "held-out queries of each of 4 heads" in capsys.readouterr().out
    assert {part.dtype for name, part in load_file(out).items() if "positions" not in name} == {torch.float32}
    metadata = load_metadata(out)
    assert metadata["model"] == "tiny-random-llama"
    assert (metadata["layers"], metadata["window"], metadata["skip_window_start"]) == ([1, 3], 32, 1)
    recorded = load_qk(out)
    assert [layer_of(name) for name in recorded] == [1, 1, 3, 3]
    (name, qk), *_ = recorded.items()
    assert qk["keys"].shape[1] == 1024 - 32
    assert qk["queries"].shape[1] == len(qk["positions"]) == 64
    scale = scale_of(name, metadata)
    assert scale == pytest.approx(qk["keys"].shape[-1] ** -0.5)
    (row,) = measure_retriever("exact", qk["keys"], qk["queries"], qk["past_queries"], scale=scale, repeats=1)
    assert row["recall"] == 1
    assert main(["bench", str(out), "--retriever", "exact", "--repeats", "1", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["keys"], row["layer"], row["batch"]) for row in rows} == {
        (name, layer_of(name), batch) for name in recorded for batch in (1, 512)
    }


def test_ctrl_c_keeps_what_was_recorded(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    advance = JobProgress.advance

    def interrupted(self: JobProgress, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, *given)

    monkeypatch.setattr(JobProgress, "advance", interrupted)
    out = tmp_path / "qk.safetensors"
    assert main(words(book, out)) == 130
    assert "Stopped; kept 320 tokens" in capsys.readouterr().out
    assert next(iter(load_qk(out).values()))["keys"].shape[1] == 4 * 63
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--record", "qk.npz"], "is no .safetensors file"),
        (["--record", "nowhere/qk.safetensors"], "there is no folder nowhere"),
        (["--record", "x.safetensors", "--tokens", "0"], "tokens=0"),
        (["--record", "x.safetensors", "--model.memory.windw=3"], "windw"),
        (["--record", "x.safetensors", "--model.backbone=nobody/nothing"], "nobody/nothing"),
        (["--record", "x.safetensors", "--data.paths=[nowhere.txt]"], "nowhere.txt"),
        (["--record", "x.safetensors", "other.npz"], "is not read with --record"),
        (["--model.memory.window=3"], "only goes with --record"),
    ],
)
def test_the_command_refuses_before_it_loads_a_model(
    more: list[str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--config", "smoke", *more]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert "Loading" not in said
    assert list(tmp_path.iterdir()) == []
