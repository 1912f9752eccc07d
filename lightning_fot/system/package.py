"""Files that are shipped inside the package: configurations, weights, recorded keys."""

from importlib.resources import files
from pathlib import Path


def shipped(*names: str) -> Path:
    """The path of a file or folder of the package.

    Args:
        *names: Its path below the package's folder, such as ``"configs", "hnsw.yaml"``.
    """
    return Path(str(files("lightning_fot").joinpath(*names)))
