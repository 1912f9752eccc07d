"""Why a plug-in could not be imported, found by reading its source: running it would load torch."""

from __future__ import annotations

import ast
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def why_broken(module: str, attribute: str) -> str | None:
    """Look for what would stop an import: missing modules, syntax errors, a missing name, a raise at the top.

    Args:
        module: Dotted module of an entry point.
        attribute: The name it must define.

    Returns:
        The reason, or None when none was found (which is no proof: only an import is).
    """
    spec = _find(module)
    if spec is None:
        return f"no module named {module!r}"
    source = _source(spec)
    if source is None:
        return None
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    defined: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Raise):
            return f"raises at import (line {node.lineno})"
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            wanted = [".".join(part for part in (base, node.module or "") if part)]
        for name in wanted:
            if name.split(".")[0] not in sys.builtin_module_names and _find(name) is None:
                return f"no module named {name!r}"
        defined |= _names_bound(node)
    head = attribute.split(".")[0]
    if head and "*" not in defined and "__getattr__" not in defined and head not in defined:
        return f"module {module!r} defines no {head!r}"
    return None


def _names_bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    bound: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            bound.add(inner.name)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            bound.add(inner.id)
        elif isinstance(inner, ast.ImportFrom | ast.Import):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in inner.names}
    return bound


def _find(module: str) -> ModuleSpec | None:
    """Find a module without importing its parents (``importlib.util.find_spec`` imports them)."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[: depth + 1])
        if name in sys.modules:
            spec = getattr(sys.modules[name], "__spec__", None)
            if spec is None:
                return ModuleSpec(module, None)
        else:
            spec = PathFinder.find_spec(name, path)
            if spec is None and depth == 0:
                spec = _editable(name)
        if spec is None:
            return None
        if depth < len(parts) - 1:
            if spec.submodule_search_locations is None:
                # A module such as os that makes os.path itself.
                return spec if spec.name in sys.modules or spec.name in sys.stdlib_module_names else None
            path = list(spec.submodule_search_locations)
    return spec


def _editable(name: str) -> ModuleSpec | None:
    """Ask the other finders: editable installs and frozen modules have their own."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and finder is not PathFinder:
            spec: ModuleSpec | None = find(name, None, None)
            if spec is not None:
                return spec
    return None


def _source(spec: ModuleSpec) -> str | None:
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8", errors="replace")
