"""Code blocks of the documentation, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks(text, language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def section(text, heading):
    """What stands below a heading of level 2 or 3, up to the next; empty where there is none."""
    found = re.search(rf"^###? {re.escape(heading)}\n(.*?)(?=^###? |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found[1] if found else ""
