"""Files for those who pick the project up: they are valid, agree with each other, and name what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_fot

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
VERSIONS = WORKFLOW["jobs"]["versions"]["strategy"]["matrix"]


def _check_schema(schema: str, *files: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, "--default-filetype", "yaml"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_keeps_to_its_schema(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    _check_schema(schema, *files)


def _commands() -> list[list[str]]:
    """Words of every command of the workflow."""
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    lines = [line for step in steps for line in step["run"].splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_commands_of_the_workflow_are_there() -> None:
    commands = _commands()
    assert len(commands) >= 5
    for program, *words in commands:
        if program.startswith("."):
            assert (ROOT / program).stat().st_mode & 0o111, program
        elif program == "python":
            assert words[:1] == ["-m"]
            assert words[1] in ("pip", "pytest"), words
            if words[1] == "pip":
                extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(words))
                assert set(",".join(extras).split(",")) - {""} <= set(PROJECT["optional-dependencies"])
        else:
            assert program in PROJECT["scripts"]


def test_expressions_of_the_workflow_name_what_the_matrix_has() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"matrix\.(\w+)", text))
    assert named == {"os", "python", "transformers"} == set(VERSIONS) - {"include"}
    assert set(re.findall(r"matrix\.transformers == '(\w+)'", text)) == set(VERSIONS["transformers"])
    for more in VERSIONS["include"]:
        assert set(more) == named


def test_the_versions_tested_are_those_that_the_project_declares() -> None:
    oldest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert oldest is not None
    minors = [int(version.removeprefix("3.")) for version in VERSIONS["python"]]
    assert minors == list(range(int(oldest[1]), 15))
    (transformers,) = (line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    floor = re.match(r"transformers>=([\d.]+),<\d+$", transformers)
    assert floor is not None
    pinned = [word for words in _commands() for word in words if word.startswith("transformers==")]
    assert pinned == [f"transformers=={floor[1]}"]


def test_one_version_in_all_files() -> None:
    version = lightning_fot.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d|unreleased)\)$", changes, flags=re.MULTILINE)
    assert releases[0] == (version, citation["date-released"])
    assert citation["version"] == version
    order = [tuple(map(int, name.split("."))) for name, _ in releases]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) == len(order)


def test_hooks_have_the_versions_of_the_constraints() -> None:
    pins = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    )
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    revisions = {Path(one["repo"]).name: one.get("rev", "").removeprefix("v") for one in hooks}
    assert revisions["ruff-pre-commit"] == pins["ruff"]
    assert revisions["check-jsonschema"] == pins["check-jsonschema"]


def test_the_contributing_guide_names_files_that_are_there() -> None:
    """Paths in code spans; those with NAME, and the dry run's, are yet to be written: their folder must be there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([\w./<>-]+/[\w./<>-]*)`", prose)
    assert len(spans) > 30
    for span in spans:
        if "<" in span:
            continue
        path = span.rpartition("/")[0] if "NAME" in span or "band." in span else span
        assert (ROOT / path).exists() or (ROOT / "lightning_fot" / path).exists(), span


def test_every_public_name_is_on_the_api_pages() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    assert len(set(described)) == len(described)
    for name in ("", ".retrievers", ".callbacks", ".data", ".report"):
        module = __import__(f"lightning_fot{name}", fromlist=["*"])
        public = {one for one in module.__all__ if not one.startswith("__")}
        shown = {one.rpartition(".")[2] for one in described}
        assert public <= shown, f"{module.__name__}: {sorted(public - shown)}"
