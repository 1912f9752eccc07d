"""Documents in forms (``multipart/form-data``), as browsers and ``curl -F`` send them: taken apart as they come."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lightning_fot.serving.requests import ApiError

# It tells each part of each form, bytes and all, to whoever logs at the level DEBUG.
logging.getLogger("python_multipart").setLevel(logging.INFO)

# What a form may have beside its file: boundaries, headers and the field `name`.
BESIDE = 2**16
_LONGEST_FIELD = 2**12


def is_form(content_type: str) -> bool:
    """Whether a request holds a form."""
    return content_type.strip().lower().startswith("multipart/")


class Form:
    """One document in a form: a file, and perhaps a field ``name``.

    Args:
        content_type: Of the request; it names the boundary.
        most: Bytes that the file may have.
        take: Gets the parts of the file.

    Raises:
        ApiError: There is no boundary, or one that cannot be.
    """

    def __init__(self, content_type: str, most: int, take: Callable[[bytes], object]) -> None:
        self._most, self._take = most, take
        self._size = 0
        self._file: str | None = None
        self._fields: dict[str, bytearray] = {}
        # Of the part that is read: its header in progress, what its headers say, and its field; None is the file.
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._disposition = b""
        self._into: bytearray | None = None
        self._ended = False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise ApiError(415, "Of forms, only multipart/form-data is taken.", code="unsupported_media_type")
        try:
            self._parser = MultipartParser(
                options.get(b"boundary", b""),
                {
                    "on_part_begin": self._on_part,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _broken(str(error)) from error
        if not options.get(b"boundary"):
            raise _broken("its Content-Type names no boundary")

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the request.

        Raises:
            ApiError: They are no form with one document, or the document is too large.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken(str(error)) from error

    def name(self) -> str:
        """What the document is called: the field ``name``, or else the file's own name without its folders.

        Raises:
            ApiError: The form is not complete, or holds no file.
        """
        if not self._ended:
            raise _broken("it breaks off")
        if self._file is None:
            raise ApiError(400, "The form holds no file. Send one: curl -F file=@book.txt.", code="invalid_form")
        given = self._fields.get("name")
        return _decoded(bytes(given), "name") if given is not None else re.split(r"[/\\]", self._file)[-1]

    def _on_part(self) -> None:
        self._header, self._disposition, self._into = (b"", b""), b"", None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0] + data[start:end], self._header[1]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0], self._header[1] + data[start:end]

    def _on_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = b"", b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = _decoded(options.get(b"name", b""), "a field's name")
        if b"filename" in options:
            if self._file is not None:
                raise ApiError(400, "The form holds several files. Send one document a request.", code="invalid_form")
            self._file = _decoded(options[b"filename"], "the file's name")
            return
        if b"filename*=" in self._disposition.replace(b" ", b"").lower():
            raise ApiError(
                400,
                "The file's name is in the form of 'filename*', which RFC 7578 forbids in forms: send 'filename'.",
                code="invalid_form",
            )
        if field != "name" or field in self._fields:
            raise ApiError(400, f"The form may hold a file and one field 'name', not '{field[:100]}'.",
                           field[:100], "unknown_parameter")  # fmt: skip
        self._into = self._fields[field] = bytearray()

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._into is not None:
            if len(self._into) + end - start > _LONGEST_FIELD:
                raise ApiError(400, f"'name' has more than {_LONGEST_FIELD:,} bytes.", "name", "invalid_value")
            self._into += data[start:end]
            return
        self._size += end - start
        if self._size <= self._most:
            self._take(data[start:end])

    def _on_end(self) -> None:
        self._ended = True

    @property
    def too_large(self) -> bool:
        """Whether the file has more bytes than it may have; those behind are thrown away."""
        return self._size > self._most


def _decoded(data: bytes, called: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"In the form, {called} is not UTF-8.", code="invalid_form") from None


def _broken(problem: str) -> ApiError:
    return ApiError(400, f"The form cannot be read: {problem}.", code="invalid_form")
