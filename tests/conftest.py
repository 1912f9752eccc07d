"""What all tests share: no network, no cache of the user, a tiny random Llama."""

from __future__ import annotations

import os
import tempfile

# Before any library reads them: tests never ask a hub, and never draw on a screen.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Finding fonts takes seconds of each process that draws, unless one has kept what it found.
os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "lightning-fot-tests-matplotlib"))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side (pyproject.toml): more threads would only get in their way.
    os.environ["OMP_NUM_THREADS"] = "1"

import signal
from pathlib import Path

import pytest

# A suite started in the background of a shell (`pytest &`) is deaf to SIGINT, and so would be the processes that
# tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised documents of tests stay out of the user's cache; subprocesses inherit it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves long searches for faults out, whatever else is selected: they run with ``-m robustness_long``."""
    if "robustness_long" in str(config.getoption("markexpr")):
        return
    for item in items:
        if item.get_closest_marker("robustness_long"):
            item.add_marker(pytest.mark.skip(reason="long: pytest -m robustness_long"))
