"""Compiles the library of ``native.cpp``. It needs a C++ compiler and nothing else: no Python headers, no packages.

Run as a module, it compiles in place: ``python -m lightning_fot.retrievers.keys.compiled``. The build of the package
does the same (``hatch_build.py``), so this file imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "native.cpp"
# For each kind of processor what the compiler is told; the best kind first.
KINDS: dict[str, list[str]] = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    KINDS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], **KINDS}
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
_SECONDS = 300.0


def digest() -> str:
    """Which source a library must be made of."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler: that of the variable ``CXX``, or the first found on the path."""
    named = os.environ.get("CXX", "").split()
    return next((found for name in (*named[:1], "c++", "g++", "clang++") if (found := shutil.which(name))), None)


def library(kind: str, folder: Path = HERE) -> Path:
    """The file of the library for a kind of processor."""
    return folder / f"_native_{kind}.so"


def compile_libraries(folder: Path = HERE) -> str | None:
    """Makes the libraries for all kinds of processors.

    Args:
        folder: Where; each is written whole or not at all.

    Returns:
        Why one could not be made; None when all were.
    """
    found = compiler()
    if found is None:
        return "there is no C++ compiler on the path"
    if sysconfig.get_platform().startswith("win"):
        return "it is not compiled on Windows"
    return next((problem for kind in KINDS if (problem := _compiled(found, kind, library(kind, folder)))), None)


def _compiled(found: str, kind: str, target: Path) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        said = ""
        # Without OpenMP (Apple's clang) a search uses one thread.
        for more in (["-fopenmp"], []):
            words = [*_FLAGS, *KINDS[kind], *more, f'-DDIGEST="{digest()}"', str(SOURCE), "-o", str(made)]
            try:
                run = subprocess.run([found, *words], capture_output=True, text=True, check=False, timeout=_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if run.returncode == 0:
                fresh = target.with_name(f"{target.name}.{os.getpid()}")
                shutil.copy2(made, fresh)
                os.replace(fresh, target)
                return None
            said = run.stderr.strip()[-500:]
    return f"{found} failed: {said}"


if __name__ == "__main__":
    problem = compile_libraries()
    print(f"not compiled: {problem}" if problem else f"compiled for {', '.join(KINDS)} in {HERE}")
    sys.exit(1 if problem else 0)
