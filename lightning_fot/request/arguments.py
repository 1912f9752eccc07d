"""Command lines of single commands: argparse whose mistakes are told like all others."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_fot.errors import SettingError


class Parser(argparse.ArgumentParser):
    """Raises what the command line prints, like all its other errors."""

    def error(self, message: str) -> NoReturn:
        raise SettingError("arguments", message, "cannot be used", f"See {self.prog} --help")
