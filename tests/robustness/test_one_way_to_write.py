"""Files are written in one way: nothing else in the package opens one for writing, or gives one its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_fot

ROOT = Path(lightning_fot.__file__).parent
# Who may call what, and why.
ALLOWED = {
    "system/files.py": "the one way",
    "system/digests.py": "fills a digest into a file that is not published yet",
    "system/tensor_files.py": "inside `writing`",
}
WRITES = {"save_file", "mkstemp", "mkdtemp", "NamedTemporaryFile", "write_text", "write_bytes", "savefig", "tofile"}
MODES = ("w", "x", "a", "r+", "+")


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", None) or getattr(function, "id", "")
            yield name, node


def _inside(tree: ast.AST, call: ast.Call, names: tuple[str, ...]) -> bool:
    """Whether the call is in the block of a ``with`` that opens one of these."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and node.lineno <= call.lineno <= (node.end_lineno or 0):
            opened = {name for item in node.items for name, _ in _calls(item.context_expr)}
            if opened & set(names):
                return True
    return False


def _opens_for_writing(name: str, call: ast.Call) -> bool:
    if name != "open":
        return False
    words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return any(isinstance(word, str) and len(word) <= 3 and any(mode in word for mode in MODES) for word in words)


def _stray(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for name, call in _calls(tree):
        own = isinstance(call.func, ast.Name) and name == "write_text"  # that of system/files.py
        stray = not own and (name in WRITES or _opens_for_writing(name, call))
        if stray and not _inside(tree, call, ("writing", "replacing", "workspace")):
            found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {name}")
    return found


# Files that hold nothing that lasts, or that grow: a lock, a claim, an upload that comes in, the null device.
NOT_WHOLE = {"sweep/folder.py": 1, "sweep/runs.py": 1, "serving/documents.py": 1, "system/output.py": 1}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_writes_in_a_way_of_its_own(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name in ALLOWED:
        return
    assert len(_stray(path)) <= NOT_WHOLE.get(name, 0), _stray(path)
