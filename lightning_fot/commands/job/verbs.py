"""``lightning run``, ``fit``, ``validate``, ``test``: the request is read and checked before torch loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_fot.commands.job.choice import choose, claimed
from lightning_fot.errors import SettingError
from lightning_fot.request.preflight import check_folder, check_settings, required_bytes
from lightning_fot.request.request import CONFIG, Request, make_request
from lightning_fot.request.words import Verb, asks_for_itself, assignments, read
from lightning_fot.system.ranks import rank, share_folder


def run(words: Sequence[str], program: str, debug: bool) -> int:
    """Trains, evaluates and reports.

    Args:
        words: Words after the verb.
        program: How it was called, such as ``lightning run``.
        debug: Leave the libraries' warnings and log lines on.

    Returns:
        Exit code: 0, or 130 and 143 when stopped by a signal.

    Raises:
        SettingError: Something cannot work.
        MissingLibraryError: A library that the settings need is not installed.
    """
    return _job("run", words, program, debug)


def fit(words: Sequence[str], program: str, debug: bool) -> int:
    """Only trains; otherwise as :func:`run`."""
    return _job("fit", words, program, debug)


def validate(words: Sequence[str], program: str, debug: bool) -> int:
    """Loss and perplexity on held-out documents; otherwise as :func:`run`."""
    return _check("validate", words, program, debug)


def test(words: Sequence[str], program: str, debug: bool) -> int:
    """As :func:`validate`, logged as test."""
    return _check("test", words, program, debug)


def predict(words: Sequence[str], program: str, debug: bool) -> int:
    """Says what to do instead: Lightning's own programs have this verb.

    Raises:
        SettingError: Always.
    """
    raise SettingError(
        "verb",
        "predict",
        "a language model has no prediction loop",
        "Use run or validate; in Python, generate: lm.generate(ids, memory=memory).",
    )


def _job(verb: str, words: Sequence[str], program: str, debug: bool) -> int:
    request = _request(verb, words, program)
    if request is None:
        return 0
    folder, checkpoint = choose(request)
    check_folder(folder.path, required_bytes(request))
    with claimed(request, folder) as folder:
        if rank() == 0:
            share_folder(folder.path)
        _say(request)
        from lightning_fot.commands.job.job import run as run_job

        return run_job(request, _arguments(request), folder, checkpoint, evaluation=verb == "run", debug=debug)


def _check(verb: str, words: Sequence[str], program: str, debug: bool) -> int:
    request = _request(verb, words, program)
    if request is None:
        return 0
    checkpoint = choose(request)[1] if request.get("ckpt_path") is not None else None
    _say(request)
    from lightning_fot.commands.job.job import check

    return check(request, _arguments(request), checkpoint, debug=debug)


def _request(verb: str, words: Sequence[str], program: str) -> Request | None:
    """The request, checked; None where a question has been answered.

    Raises:
        SettingError: There is no configuration, or something in it cannot work.
    """
    given = read(words, Verb(program, (CONFIG,), settings=("",)))
    if given.help:
        _answer(Request(verb, [], ["--help"], program=program))
        return None
    request = make_request(verb, given.options.config, given.settings, program)
    if not request.configs:
        raise SettingError(
            "config", None, f"{verb} needs a configuration", f"Write: {program} --config hnsw (or your own YAML)."
        )
    check_settings(request)
    if any(asks_for_itself(name) for name, _ in assignments(request.overrides)):
        _answer(request)
        return None
    return request


def _say(request: Request) -> None:
    for note in request.notes:
        print(note, file=sys.stderr)


def _arguments(request: Request) -> list[str]:
    """What jsonargparse gets: real paths, and the overrides as given."""
    return [*(word for path in request.configs for word in ("--config", str(path))), *request.overrides]


def _answer(request: Request) -> None:
    """Lets jsonargparse print its help, that of a class, or the resolved configuration.

    Raises:
        SettingError: It cannot.
    """
    from lightning_fot.commands.job.parsing import parse, quiet

    quiet()
    try:
        parse(request, _arguments(request))
    except SystemExit as stop:
        if stop.code:
            raise
