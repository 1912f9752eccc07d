"""Long searches for faults run when they are asked for: ``pytest -m robustness_long``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long ones out, whatever else is selected."""
    if "robustness_long" in str(config.getoption("markexpr")):
        return
    for item in items:
        if item.get_closest_marker("robustness_long"):
            item.add_marker(pytest.mark.skip(reason="long: pytest -m robustness_long"))
