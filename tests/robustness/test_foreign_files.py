"""Files that are not what they are given for: each is read, or refused by name, whatever is in it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fot.bench import load_metadata, load_qk
from lightning_fot.errors import SettingError
from lightning_fot.training.opening import FOR_WEIGHTS, check_checkpoint, read_checkpoint

RANDOM = np.random.default_rng(0)
KEYS, QUERIES = (RANDOM.normal(size=(2, count, 16)).astype(np.float32) for count in (30, 5))
WITH_NAN = KEYS.copy()
WITH_NAN[0, 5, 3] = np.nan


@pytest.mark.parametrize(
    "keys",
    [
        KEYS,
        KEYS.astype(">f4"),
        np.asfortranarray(KEYS),
        KEYS.astype(np.float64),
        KEYS.astype(np.float16),
        KEYS.astype(np.longdouble),
        (10 * KEYS).astype(np.int8),
    ],
    ids=["plain", "big-endian", "Fortran", "float64", "float16", "long double", "int8"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_keys_of_any_number_are_read(tmp_path: Path, keys: Any, save: Callable[..., None]) -> None:
    beside = {"note": np.array("words"), "meta": np.array([{"a": 1}], dtype=object)}
    save(tmp_path / "x.npz", a_keys=keys, a_queries=QUERIES, **beside)
    found = load_qk(tmp_path / "x.npz")["a"]
    assert torch.equal(found["keys"], torch.from_numpy(np.ascontiguousarray(keys.astype(np.float32))))
    assert torch.equal(found["queries"], torch.from_numpy(QUERIES))


@pytest.mark.parametrize(
    ("keys", "queries", "named"),
    [
        (WITH_NAN, QUERIES, "a_keys"),
        (KEYS, np.full_like(QUERIES, np.inf), "a_queries"),
        (KEYS.astype(np.float64) * 1e300, QUERIES, "a_keys"),
        (KEYS[:, :0], QUERIES, "a_keys"),
        (KEYS, QUERIES[:, :0], "a_queries"),
        (KEYS.transpose(0, 2, 1), QUERIES, "a_queries"),
        (KEYS[:1], QUERIES, "a_queries"),
        (KEYS.astype(np.complex64), QUERIES, "a_keys"),
        (np.array([KEYS, None], dtype=object), QUERIES, "Object arrays"),
        (np.float32(3), QUERIES, "a_keys"),
    ],
    ids=["NaN", "inf", "too large", "no keys", "no queries", "transposed", "banks", "complex", "objects", "number"],
)
def test_keys_that_cannot_be_searched_are_refused_by_name(tmp_path: Path, keys: Any, queries: Any, named: str) -> None:
    np.savez(tmp_path / "x.npz", a_keys=keys, a_queries=queries)
    with pytest.raises(SettingError, match=named):
        load_qk(tmp_path / "x.npz")


def _npz(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a_keys.npy", content)
            archive.writestr("a_queries.npy", content)

    return write


_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1000000000, 3200), }"
_HUGE = b"\x93NUMPY\x01\x00" + (len(_HEADER) + 1).to_bytes(2, "little") + _HEADER.encode() + b"\n"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"hello"),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
        _npz(_HUGE),
        _npz(b"no array"),
        _npz(_HUGE[:20]),
    ],
    ids=["empty", "words", "zip", "long header", "list", "25 TB", "no array", "half a header"],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / f"x{suffix}"
    write(path)
    with pytest.raises(SettingError, match="qk="):
        load_qk(path)
    if suffix == ".safetensors":
        with pytest.raises(SettingError, match="qk="):
            load_metadata(path)


class _Runs:
    """Would write a file if its pickle were run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


_WHOLE: dict[str, Any] = {
    "state_dict": {"a": torch.ones(2)},
    "global_step": 3,
    "epoch": 0,
    "loops": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), pickle.dumps({"state_dict": {}}), b"\x80\x02}q\x00."],
    ids=["empty", "words", "half a zip", "empty zip", "pickle", "old pickle"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(SettingError, match="ckpt_path"):
        check_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.ones(3),
        {},
        {"a": torch.ones(2)},
        {**_WHOLE, "state_dict": [1]},
        {**_WHOLE, "global_step": "three"},
        {**_WHOLE, "optimizer_states": None},
        {name: part for name, part in _WHOLE.items() if name != "loops"},
    ],
    ids=["list", "tensor", "nothing", "weights", "no weights", "steps", "optimizers", "loops"],
)
def test_a_checkpoint_without_its_parts_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(SettingError, match=r"ckpt_path.*cannot be used"):
        check_checkpoint(tmp_path / "last.ckpt")


def test_no_code_runs(tmp_path: Path) -> None:
    torch.save({**_WHOLE, "more": _Runs(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(SettingError, match="ckpt_path"):
        check_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save(_WHOLE, tmp_path / "last.ckpt")
    check_checkpoint(tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt", FOR_WEIGHTS)["global_step"] == 3


@pytest.mark.parametrize("folder", [True, False])
def test_a_folder_or_nothing_is_no_checkpoint(tmp_path: Path, folder: bool) -> None:
    if folder:
        (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(SettingError, match="ckpt_path"):
        check_checkpoint(tmp_path / "last.ckpt")
