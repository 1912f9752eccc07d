"""Bytes are altered in every kind of file that the product writes: each change is told by name, or made good.

What a reader gives must be what was written; a named error counts too. Another value is silently wrong, and any other
exception is a traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fot import CrossbatchConfig, FocusedTransformer, MemoryConfig, attach_memory, attach_pretrained
from lightning_fot.bench import load_metadata, load_qk
from lightning_fot.config.backbone import LoraSettings
from lightning_fot.data.text.tokens import TextEncoder
from lightning_fot.errors import SettingError
from lightning_fot.evaluation.measures.recording import Recording, RecordSettings
from lightning_fot.library.inbox import Inbox
from lightning_fot.library.library import Library
from lightning_fot.pretrained import load_backbone, load_tokenizer
from lightning_fot.pretrained.delta import write_delta
from lightning_fot.report import load_results
from lightning_fot.request.model import ModelSettings
from lightning_fot.retrievers import create_retriever
from lightning_fot.sweep.folder import SweepFolder
from lightning_fot.system.digests import write_sealed
from lightning_fot.system.kinds import KINDS, Digest, Kind, Then, kind_of
from lightning_fot.system.tensor_files import load_tensors
from lightning_fot.training.opening import FOR_WEIGHTS, check_checkpoint, read_checkpoint
from lightning_fot.training.parameters import load_adapter, save_adapter
from lightning_fot.training.run_folder import RunFolder

SHORT, LONG = 6, 60
TINY = "tiny-random-llama"
MEMORY = {"memory_layers": [1, 3], "window": 16, "top_k": 4}
TEXT = "Some text of several words, again and again, which is long enough to be kept. " * 60
AGAIN = "made again"


@dataclass(frozen=True)
class Case:
    """Something that the product writes into a folder, and reads."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _ids(count: int) -> Tensor:
    return torch.arange(3, 3 + count)[None] % 380


def _memory(folder: Path) -> None:
    with attach_memory(load_backbone(TINY), MemoryConfig(**MEMORY)) as lm:
        memory = lm.ingest(_ids(60), lm.new_memory(), document="first")
        memory.save(folder)
        lm.ingest(_ids(20), memory, document="second").save(folder)


def _read_memory(folder: Path) -> Any:
    with attach_memory(load_backbone(TINY), MemoryConfig(**MEMORY)) as lm:
        memory = lm.load_memory(folder)
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in memory.layers.values()]
        return layers, [(one.name, one.stored) for one in memory.documents]


def _library(folder: Path) -> None:
    library = Library(folder, ModelSettings(TINY, dict(MEMORY)))
    for name in ("first.txt", "second.txt"):
        library.add(name, name * 3)
    library.write()
    # From here on in the journal.
    library.add("third.txt", "third" * 3)
    library.remove(library.documents[0])
    library.write()


def _read_library(folder: Path) -> Any:
    library = Library.read(folder)
    return library.model.flat(), [dataclasses.asdict(one) for one in library.documents]


def _tokens(folder: Path) -> Any:
    encoder = TextEncoder(load_tokenizer(TINY), folder)
    return encoder.encode([TEXT])[0].copy(), np.array(encoder.encode_on_disk(lambda: [TEXT]))


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(16) + index
        return {"input_ids": ids, "targets": ids}


def _checkpoint(folder: Path) -> None:
    module = FocusedTransformer(TINY, MemoryConfig(**MEMORY), CrossbatchConfig(), trainable="memory_attention")
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about loaders that are not there
        trainer.fit(module, DataLoader(_Rows(), batch_size=4))
    trainer.save_checkpoint(folder / "last.ckpt")


def _read_checkpoint(folder: Path) -> Any:
    check_checkpoint(folder / "last.ckpt")
    found = read_checkpoint(folder / "last.ckpt", FOR_WEIGHTS)
    return found["state_dict"], found["optimizer_states"], found["loops"]


def _retriever(folder: Path) -> None:
    retriever = create_retriever("exact", dim=8, banks=2)
    retriever.add(torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)))
    retriever.remove([torch.tensor([3]), None])
    retriever.save(folder)


def _read_retriever(folder: Path) -> Any:
    retriever = create_retriever("exact", dim=8, banks=2)
    retriever.load(folder)
    return retriever.search(torch.ones(2, 3, 8), 50)


def _recording(folder: Path) -> None:
    with attach_memory(load_backbone(TINY), MemoryConfig(**MEMORY)) as lm:
        recording = Recording(lm, RecordSettings(tokens=64, past=16, queries=16))
        recording.read(_ids(recording.wanted))
        for name in ("mine.safetensors", "recordings/0123.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            recording.save(folder / name, TINY, "numbers")


def _read_recording(folder: Path) -> Any:
    found = [load_qk(folder / "mine.safetensors"), load_metadata(folder / "mine.safetensors")]
    try:
        # As a sweep asks whether it has to record.
        return found, load_tensors(folder / "recordings" / "0123.safetensors")
    except ValueError:
        return AGAIN


def _model(folder: Path) -> None:
    with attach_memory(load_backbone(TINY), MemoryConfig(**MEMORY, attending="gate")) as lm:
        lm.save_pretrained(folder, load_tokenizer(TINY))


def _read_model(folder: Path) -> Any:
    tokenizer = load_tokenizer(str(folder))
    with attach_pretrained(str(folder)) as lm:
        weights = {**lm.model.state_dict(), **{f"gate {name}": gate.detach() for name, gate in lm.gates.items()}}
        config = lm.model.config.to_dict()
        return weights, lm.config, {**config, "_name_or_path": None}, tokenizer("a word").input_ids


def _delta(folder: Path) -> None:
    before = dict(load_backbone(TINY).named_parameters())
    after = {name: part + 0.01 if "layers.3.mlp" in name else part for name, part in before.items()}
    write_delta(folder, TINY, MemoryConfig(**MEMORY), before, after, {"steps": 1})


def _read_delta(folder: Path) -> Any:
    with attach_pretrained(str(folder)) as lm:
        return lm.model.state_dict(), lm.config


def _with_adapters() -> FocusedTransformer:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    module = FocusedTransformer(TINY, MemoryConfig(**MEMORY), CrossbatchConfig(), lora=LoraSettings(rank=2))
    module.configure_model()
    return module


def _adapter(folder: Path) -> None:
    save_adapter(_with_adapters().backbone, folder)


def _read_adapter(folder: Path) -> Any:
    module = _with_adapters()
    load_adapter(module.backbone, folder)
    return {name: part for name, part in module.state_dict().items() if "lora" in name}


def _cells(folder: Path) -> None:
    SweepFolder(folder).write("0a1b", {"settings": {"M": 8}, "rows": [{"recall": 0.9, "query": {}}], "seconds": 1.5})


def _run(folder: Path) -> None:
    run = RunFolder(folder)
    run.write_training({"steps": 30, "tokens": 1920, "loss_last": 2.5})
    run.write_partial("0a1b", {"perplexity 64": [1.5, 2.5]})
    write_sealed(run.results, {"schema": 1, "complete": True, "perplexity": [{"value": 12.5}]})


def _read_run(folder: Path) -> Any:
    run = RunFolder(folder)
    try:
        results = load_results(folder)
    except ValueError as error:
        # As the commands say it.
        raise SettingError("RUN", str(folder), str(error), "Give another folder.") from error
    training, partial = run.read_training(), run.read_partial("0a1b")
    return AGAIN if training is None or not partial else (results, training, partial)


def _inbox(folder: Path) -> None:
    inbox = Inbox(folder)
    for name in ("first", "second"):
        with inbox.part() as part:
            part.write_text(f"{name}: {TEXT}", encoding="utf-8")
            inbox.add(part, name, hashlib.sha256(name.encode()).hexdigest(), 300)
    inbox.close()


def _read_inbox(folder: Path) -> Any:
    inbox = Inbox(folder)
    try:
        return [(dataclasses.asdict(one), "".join(inbox.source(one).pieces())) for one in inbox.waiting]
    finally:
        inbox.close()


CASES = {
    "memory": Case(_memory, _read_memory),
    "library": Case(_library, _read_library),
    "inbox": Case(_inbox, _read_inbox),
    "tokens": Case(_tokens, _tokens),
    "checkpoint": Case(_checkpoint, _read_checkpoint),
    "retriever": Case(_retriever, _read_retriever),
    "recording": Case(_recording, _read_recording),
    "model": Case(_model, _read_model),
    "delta": Case(_delta, _read_delta),
    "adapter": Case(_adapter, _read_adapter),
    "sweep": Case(_cells, lambda folder: SweepFolder(folder).read("0a1b") or AGAIN),
    "run": Case(_run, _read_run),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, written once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            CASES[name].write(made[name])
        return made[name]

    return folder


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray):
        return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _alter(name: str, source: Path, target: Path, times: int, seed: int) -> list[str]:
    """Alters ``times`` bytes of each file with a digest, one at a time; what went wrong."""
    shutil.copytree(source, target)
    case, draw, wrong = CASES[name], random.Random(seed), []
    expected = case.read(target)
    for file in _files(target):
        kind = kind_of(file)
        assert kind is not None
        if kind.digest is Digest.NONE:
            continue
        whole = file.read_bytes()
        for _ in range(times):
            place, change = draw.randrange(len(whole)), draw.randrange(1, 256)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            what = f"{file.relative_to(target)}: byte {place} of {len(whole)} ^ {change}"
            try:
                found = case.read(target)
            except SettingError:
                if kind.then is Then.MADE_AGAIN:
                    wrong.append(f"{what}: refused, though it can be made again")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                made_again = kind.then is Then.MADE_AGAIN and found == AGAIN if isinstance(found, str) else False
                if not made_again and not _same(found, expected):
                    wrong.append(f"{what}: another value")
            file.write_bytes(whole)
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_altered_bytes_are_told(name: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    assert _alter(name, written(name), tmp_path / "copy", SHORT, seed=1) == []


@pytest.mark.robustness_long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_many_altered_bytes_are_told(name: str, seed: int, written: Callable[[str], Path], tmp_path: Path) -> None:
    assert _alter(name, written(name), tmp_path / "copy", LONG, seed) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [0, 1, 0.5])
def test_files_cut_short_are_told(name: str, length: float, written: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written(name), folder)
    case, wrong = CASES[name], []
    expected = case.read(folder)
    for file in _files(folder):
        kind = kind_of(file)
        assert kind is not None
        if kind.digest is Digest.NONE:
            continue
        whole = file.read_bytes()
        cut = whole[: int(length if length != 0.5 else len(whole) / 2)]
        right = [expected]
        if kind.then is Then.BEGINNING:
            file.write_bytes(cut[: cut.rfind(b"\n") + 1])
            right = [case.read(folder)]
        file.write_bytes(cut)
        try:
            found = case.read(folder)
        except SettingError:
            pass
        except Exception as error:
            wrong.append(f"{file.name}: {error!r}")
        else:
            if not (isinstance(found, str) and found == AGAIN) and not any(_same(found, one) for one in right):
                wrong.append(f"{file.name}: another value")
        file.write_bytes(whole)
    assert wrong == []


@pytest.mark.parametrize("name", CASES)
def test_no_file_is_of_an_unknown_kind(name: str, written: Callable[[str], Path]) -> None:
    strange = [path.name for path in _files(written(name)) if kind_of(path) is None]
    assert strange == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.digest is not Digest.NONE], ids=lambda kind: kind.name)
def test_each_kind_with_a_digest_is_altered_here(kind: Kind, written: Callable[[str], Path]) -> None:
    files = [file for name in CASES for file in _files(written(name)) if kind_of(file) is kind]
    assert files


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_without_a_digest_says_why(kind: Kind) -> None:
    assert (kind.digest is Digest.NONE) == bool(kind.why) == (kind.then is Then.BELIEVED)
