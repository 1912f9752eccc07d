"""Uploading saved folders to the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_fot.errors import SettingError


def upload(
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload with lightning-fot",
    outdated: Sequence[str] = (),
) -> str:
    """Uploads files of a folder in one commit; the repository is made where it is missing.

    Args:
        folder: Where they are.
        files: Their names; nothing else leaves this machine.
        repo_id: Of the hub, as ``user/name``.
        repo_type: ``model`` or ``dataset``.
        private: Whether a repository that is made can be seen by its owner alone; one that is there stays as it is.
        token: Of the hub; None takes that of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch; None is the main one.
        message: Of the commit.
        outdated: Patterns of files of an earlier upload, which go in the same commit.

    Returns:
        Address of the commit.

    Raises:
        SettingError: The hub cannot be reached or refuses, or ``repo_id`` cannot be one; says which and why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # Read now: the library itself looks when it is imported.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    try:
        made = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            repo_type=repo_type,
            folder_path=folder,
            allow_patterns=list(files),
            delete_patterns=list(outdated) or None,
            revision=revision,
            commit_message=message,
        )
    except HFValidationError as error:
        raise SettingError("repo_id", repo_id, f"cannot be one ({error})", "Give user/name.") from error
    except OfflineModeIsEnabled as error:
        raise SettingError(
            "repo_id", repo_id, "cannot be uploaded to: HF_HUB_OFFLINE is set", "Unset it, or upload from elsewhere."
        ) from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise SettingError(
            "repo_id", repo_id, f"is refused by the hub ({_first_line(error)})",
            "Log in with hf auth login, or give a token that may write there.",
        ) from error  # fmt: skip
    except _unanswered(HfHubHTTPError) as error:
        raise SettingError(
            "repo_id", repo_id, f"cannot be uploaded to: the hub does not answer ({_first_line(error)})",
            "Look at the network and HF_ENDPOINT, and try again.",
        ) from error  # fmt: skip
    return str(commit.commit_url)


def _unanswered(refused: type[Exception]) -> tuple[type[Exception], ...]:
    """Errors of the library that speaks HTTP, which changes with the hub's: the refusal is one of its own."""
    return ConnectionError, *(base for base in refused.__bases__ if issubclass(base, Exception) and base is not OSError)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
