"""The annotated file tree of docs/architecture.md, from the first sentence of each module: python tests/file_tree.py"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_fot"
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## Every file"
_WIDTH = 150


def modules():
    """Python files of the package, by their paths below it, folders behind the files beside them."""
    found = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return sorted(found, key=lambda path: [(part != path.name, part) for part in path.parts])


def sentence(path):
    """The first sentence of a module, or of what it says in its first paragraph as far as a line holds."""
    text = ast.get_docstring(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))) or ""
    words = " ".join(text.split("\n\n")[0].split()).replace("``", "")
    return re.split(r"(?<=[a-z)])\. ", words)[0].rstrip(".")


def tree():
    """The tree as text, a line a file."""
    lines = ["lightning_fot/"]
    folder = Path(".")
    for path in modules():
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{'  ' * len(folder.parts)}{folder.name}/")
        name = f"{'  ' * len(path.parts)}{path.name}"
        line = f"{name:<28} {sentence(path)}"
        lines.append(line if len(line) <= _WIDTH else line[: _WIDTH - 2].rsplit(" ", 1)[0] + " …")
    return "\n".join(lines)


def listed(text):
    """Paths below the package that a tree names."""
    folders, found = [], []
    for line in text.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name[:-1])
        else:
            found.append(Path(*folders, name))
    return found


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = page.partition(f"{HEADING}\n")
    rest = re.search(r"^## ", after, flags=re.MULTILINE)
    said = "\n`python tests/file_tree.py` writes this section from the first sentence of each module.\n"
    block = f"{HEADING}\n{said}\n```text\n{tree()}\n```\n"
    PAGE.write_text(before.rstrip() + f"\n\n{block}" + (f"\n{after[rest.start() :]}" if rest else ""), encoding="utf-8")
