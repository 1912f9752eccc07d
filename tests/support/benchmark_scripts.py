"""Running a benchmark's script inside the test process."""

import runpy
import sys

import pytest


def refused(script, arguments, monkeypatch, capsys):
    """What the script says when it refuses ``--quick`` and these arguments, before any work."""
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2
    return capsys.readouterr().err
