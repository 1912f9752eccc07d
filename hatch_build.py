"""The build's one step of its own: compiles the core of searches, where there is a compiler; goes on without it else.

``LIGHTNING_FOT_NATIVE=0`` leaves it out: a wheel for every machine, in which searches run in torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KEYS = "lightning_fot/retrievers/keys"


def _compiled(root: Path) -> ModuleType:
    """The package's module, alone: what the package imports is not there while it is built."""
    spec = importlib.util.spec_from_file_location("compiled", root / KEYS / "compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeHook(BuildHookInterface[Any]):
    """Puts the compiled libraries into a wheel, or beside their source where the installation is editable."""

    PLUGIN_NAME = "custom"
    folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles before the wheel is written."""
        if os.environ.get("LIGHTNING_FOT_NATIVE", "1") == "0":
            return
        module = _compiled(Path(self.root))
        if version == "editable":
            problem = module.compile_libraries()
        else:
            self.folder = tempfile.mkdtemp()
            problem = module.compile_libraries(Path(self.folder))
        if problem is not None:
            self.app.display_warning(f"searches will run in torch, several times slower: {problem}")
            return
        if self.folder is not None:
            for made in sorted(Path(self.folder).iterdir()):
                build_data["force_include"][str(made)] = f"{KEYS}/{made.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes what was compiled outside the wheel."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
