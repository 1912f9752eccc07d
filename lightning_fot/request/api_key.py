"""The API key of a server, as it is given to those who run it and those who ask it."""

from __future__ import annotations

from pathlib import Path

from lightning_fot.errors import SettingError


def check_key(key: str | None) -> None:
    """Refuses an API key that a header cannot carry; None is no key.

    Raises:
        SettingError: It cannot.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise SettingError("api_key", "…", "must be printable ASCII without spaces around it", "Choose another.")


def read_key(key: str | None, file: str | None) -> str | None:
    """The API key that a command line gives, by itself or in a file; None without.

    Raises:
        SettingError: Both are given, or the file holds none.
    """
    if file is None:
        return key
    if key is not None:
        raise SettingError("api_key_file", file, "is given beside api_key", "Give one of them.")
    try:
        read = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingError("api_key_file", file, f"cannot be read ({reason})", "Give a file with the key.") from error
    if not read:
        raise SettingError("api_key_file", file, "is empty", "Write a key into it.")
    return read
