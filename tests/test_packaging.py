"""sdist → wheel → installed elsewhere: nothing is lost, nothing is packed twice, and it runs from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lightning_fot.retrievers.keys.compiled import KINDS, compiler, library

pytestmark = pytest.mark.slow


def _run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Paths of sdist and wheel; ``build`` makes the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, repository)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def _package_files(repository: Path) -> set[str]:
    package = repository / "lightning_fot"
    return {
        path.relative_to(repository).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("_native_")
    }


def test_wheel_holds_the_package_and_nothing_else(repository: Path, built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lightning_fot"}
    native = (
        {library(kind, Path("lightning_fot/retrievers/keys")).as_posix() for kind in KINDS} if compiler() else set()
    )
    assert {name for name in names if ".dist-info/" not in name} == _package_files(repository) | native
    assert ("-py3-none-any.whl" in built[1].name) == (not native)
    assert {"lightning_fot/py.typed", "lightning_fot/configs/hnsw.yaml", "lightning_fot/configs/smoke.yaml"} <= set(
        names
    )
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(built[1]).read(licence)


def test_sdist_holds_no_second_copies(repository: Path, built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "constraints.txt", "LICENSE", "README.md", "tests/conftest.py"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("configs", "retrievers", "callbacks")]
    assert _package_files(repository) <= set(names)


def test_without_a_compiler_the_wheel_is_pure(repository: Path, tmp_path: Path) -> None:
    """It builds all the same, and says what is missing."""
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(repository)]
    done = _run(*words, env={**os.environ, "PATH": str(tmp_path), "CXX": ""})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no C++ compiler" in done.stdout + done.stderr
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_native_" in name]


def test_links_at_the_root_lead_into_the_package(repository: Path) -> None:
    for name in ("configs", "retrievers", "callbacks"):
        link = repository / name
        assert link.is_symlink()
        assert link.resolve() == (repository / "lightning_fot" / name).resolve()


def test_installed_wheel_runs_from_an_empty_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    (site,) = environment.glob("lib/python*/site-packages")
    # The libraries of the environment that runs the tests, without installing torch again.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    python = environment / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--ignore-installed", built[1])
    empty = tmp_path / "empty"
    empty.mkdir()
    where = _run(python, "-c", "import lightning_fot; print(lightning_fot.__file__)", cwd=empty).stdout.strip()
    assert Path(where).is_relative_to(site)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Entry points of the environment behind the .pth name the same distribution: PATH decides which script runs.
    script = environment / "bin" / "lightning"
    assert "lightning_fot" in script.read_text(encoding="utf-8")
    done = _run(script, "run", "--config", "smoke.yaml", cwd=empty, env=clean)
    assert "shipped with lightning-fot" in done.stderr
    results = json.loads((empty / "runs" / "smoke" / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == 1
    assert results["complete"]
