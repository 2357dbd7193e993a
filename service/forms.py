"""Parse multipart forms that are small enough to be held in memory, from the complete body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 512
MAX_TEXT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Part:
    """One part of a form. A part is a file if it has a file name or a content type that is not text."""

    name: str
    filename: str | None
    content_type: str
    content: bytes

    @property
    def is_file(self) -> bool:
        return self.filename is not None or not (self.content_type == "" or self.content_type.startswith("text/"))

    @property
    def text(self) -> str:
        if len(self.content) > MAX_TEXT_BYTES:
            raise HTTPException(400, f"The form field {self.name[:100]!r} is longer than {MAX_TEXT_BYTES:,} bytes")
        return self.content.decode("utf-8", "replace")


async def read_form(request: Request) -> list[Part]:
    """Return the parts of a multipart body, in order. Raises `HTTPException` 400 for an invalid body."""
    body = await request.body()
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if not boundary:
        raise HTTPException(400, "The multipart body cannot be read: its Content-Type has no boundary")
    return parse_form(body, boundary)


def parse_form(body: bytes, boundary: bytes) -> list[Part]:
    """Return the parts of a multipart body with this boundary."""
    collector = _Collector(body)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise HTTPException(400, f"The multipart body cannot be read: {error}") from None
    if not collector.complete:
        raise HTTPException(400, "The multipart body cannot be read: it ends before its last boundary")
    return collector.parts


class _Collector:
    """Collects the parts of one body. The parser gets the body in one piece, so its positions are positions in `body`."""

    def __init__(self, body: bytes) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._content: list[bytes] = []

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_part_data": self._on_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise HTTPException(400, f"The multipart body has more than {MAX_PARTS} parts")
        self._headers, self._content = {}, []
        self._field = self._value = b""

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def _end_part(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise HTTPException(400, "The multipart body cannot be read: a part has no name")
        filename = options.get(b"filename")
        self.parts.append(
            Part(
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                self._headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower(),
                b"".join(self._content),
            )
        )

    def _end(self) -> None:
        self.complete = True
