"""``lightning serve``: named memories over HTTP, for OpenAI's clients and a browser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec

from lightning_fot.errors import MissingLibraryError, SettingError
from lightning_fot.library.library import Library, existing
from lightning_fot.pretrained.quiet import quietly
from lightning_fot.request.api_key import read_key
from lightning_fot.request.words import Option, Verb, read
from lightning_fot.serving.settings import ServerSettings

_INSTALL = "pip install 'lightning-fot[serve]'"
_NEEDED = ("starlette", "uvicorn", "python_multipart")
_OPTIONS = (
    Option("host", "address to listen at (default 127.0.0.1: this machine alone)", str, "127.0.0.1"),
    Option("port", "port (default 8000; 0 takes a free one)", int, 8000),
    Option("api_key", "what clients have to send; needed for any other address", str),
    Option("api_key_file", "file with the key, which others do not see among the processes", str, metavar="FILE"),
    Option("max_batch", "answers generated side by side (default 8)", int, 8, group="limits"),
    Option("max_queue", "answers that may wait (default 64); more are refused (429)", int, 64, group="limits"),
    Option("max_prompt_tokens", "longest prompt (default 8192)", int, 8192, group="limits"),
    Option("max_tokens", "longest answer, and what is generated where a request does not say (default 512)", int, 512,
           group="limits"),
    Option("max_body_bytes", "largest request (default 1048576)", int, 2**20, group="limits"),
    Option("max_document_bytes", "largest document to upload (default 33554432)", int, 32 * 2**20, group="limits"),
    Option("max_document_tokens", "longest document to upload (default 10000000)", int, 10_000_000, group="limits"),
    Option("max_documents_waiting", "uploads that may wait to be read, for each memory (default 64)", int, 64,
           group="limits"),
    Option("max_connections", "requests at once (default 512); more are refused (503)", int, 512, group="limits"),
    Option("timeout", "seconds in which a client has to have sent its request (default 30)", float, 30.0,
           group="limits"),
    Option("grace", "seconds to finish answers in when stopped (default 30)", float, 30.0, group="limits"),
)  # fmt: skip
VERB = Verb(
    "lightning serve",
    _OPTIONS,
    plain=("MEMORY…",),
    plain_about=("names below memories/, or folders; all made with one model",),
    about="Serves memories that `ingest` made over HTTP, as OpenAI's interface does models. Each answer carries the "
    "passages that it attended to.",
    epilog="Ctrl-C, or SIGTERM, lets the answers in flight finish first. See docs/serving.md.",
)


def serve(words: Sequence[str], program: str, debug: bool = False) -> int:
    """Runs the command.

    Args:
        words: Words after ``serve``.
        program: How it was called.
        debug: Leave the libraries' log lines on.

    Returns:
        Exit code: 130 and 143 when stopped by a signal, which is the way to stop it.

    Raises:
        SettingError: An argument or a memory cannot be used.
        MissingLibraryError: The extra ``serve`` is not installed.
    """
    verb = replace(VERB, program=program)
    given = read(words, verb)
    if given.help:
        print(verb.help())
        return 0
    for library in _NEEDED:
        if find_spec(library) is None:
            raise MissingLibraryError(library, _INSTALL, "lightning serve")
    options = given.options
    options.api_key = read_key(options.api_key, options.api_key_file)
    settings = ServerSettings(**{field.name: getattr(options, field.name) for field in fields(ServerSettings)})
    libraries = _libraries(given.plain)
    return _run(libraries, settings, debug)


def _libraries(names: Sequence[str]) -> dict[str, Library]:
    """Libraries by the name that clients use: the folder's."""
    libraries: dict[str, Library] = {}
    for word in names:
        library = existing(word)
        library.refuse_foreign()
        name = library.path.resolve().name
        if name in libraries:
            raise SettingError("MEMORY", word, f"is called {name}, as another one is", "Give each once.")
        libraries[name] = library
    (first_name, first), *rest = libraries.items()
    own = first.model.flat()
    for name, library in rest:
        other = library.model.flat()
        key = next((key for key in own if own[key] != other.get(key)), None)
        if key is not None:
            raise SettingError(
                "MEMORY", name, f"was made with {key}={other.get(key)!r}, and {first_name} with {key}={own[key]!r}",
                "One server has one model: start another server for it.",
            )  # fmt: skip
    first.model.check()
    return libraries


def _run(libraries: dict[str, Library], settings: ServerSettings, debug: bool) -> int:
    from lightning_fot.system.signals import StopGuard, Stopped

    # Uvicorn takes the signals while it serves, and hands them on to this guard when it has come to its end.
    with StopGuard(lambda text: None) as guard:
        try:
            with quietly(debug):
                model = next(iter(libraries.values())).model
                _say(f"Loading {model.backbone} and {', '.join(libraries)} …")
                from lightning_fot.serving.server import Server
                from lightning_fot.training.opening import open_model

                server = Server(*open_model(model), libraries, settings)
                guard.deferred = True

                def ready(address: str) -> None:
                    _say(_ready(address, libraries, settings))
                    if guard.pending is not None:
                        # It came just before Uvicorn took the signals.
                        server.stop()

                server.run(ready)
            guard.check()
        except Stopped as stopped:
            _say("Stopped.")
            return stopped.exit_code
    return 0


def _ready(address: str, libraries: dict[str, Library], settings: ServerSettings) -> str:
    key = "" if settings.api_key is None else " with the API key"
    return f"Serving {', '.join(libraries)} at {address}{key}; OpenAI's clients take base_url={address}/v1"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
