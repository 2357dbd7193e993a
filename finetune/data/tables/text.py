"""Read CSV and TSV, in the encodings and with the separators of spreadsheet programs, and JSON lines."""

from __future__ import annotations

import base64
import binascii
import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.bundle.image_formats import HEAD_BYTES
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits, check_bytes
from finetune.data.files import LocalFile, SourceFile, StoredFile
from finetune.data.names import decode_names
from finetune.data.places.tree import FOREIGN_IMAGE_SUFFIXES, IMAGE_SUFFIXES, Node
from finetune.data.reading import Reading
from finetune.data.tables.rows import WHOLE_FILE, Cell, Row, Table
from finetune.errors import DataError, ImageError
from finetune.messages import printable

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_CELL = 1 << 24
_IMAGES_IN_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "SUkqA", "TU0AK", "Qk0")
_LINES_LOOKED_AT = 20  # of a table, to find single quotes, and spaces after separators
_UTF16_SHARE = 0.3  # of bytes that are 0 at one parity, from which a text is UTF-16
_LOOKED_AT = 100  # lines of a JSON table, for the names of its columns


def open_separated(node: Node, reading: Reading) -> Table:
    """Open a CSV or TSV file. All cells are returned as texts: ``007`` is not 7, and ``null`` is a word."""
    text, remarks = _text_of(node)
    text, declared, skipped = _without_preamble(text)
    remarks += [f"{printable(node.name)}: {sentence}" for sentence in skipped]
    separator = declared or ("\t" if node.suffix == ".tsv" else _separator_of(text))
    if separator != "," and node.suffix != ".tsv":
        remarks.append(f"the columns of {printable(node.name)} are separated by {_SEPARATORS[separator]}")
    header = next(_lines(text, separator, node), (0, []))[1]
    if not header:
        raise DataError(f"{printable(node.path)}: the table is empty")
    has_header = not any(_names_image(cell) for cell in header)
    spaced = any(cell != cell.strip() for cell in header) or _after_separators(_lines(text, separator, node), skip=has_header)
    if spaced:
        remarks.append(f"{printable(node.name)}: spaces around the cells were left out, as the first lines have them throughout")
    quoted = _in_single_quotes(_lines(text, separator, node), skip=has_header)
    if quoted:
        remarks.append(f"{printable(node.name)}: single quotes around the cells were left out")
    columns = [cell.strip() for cell in header] if has_header else [f"column {n}" for n in range(1, len(header) + 1)]
    if not has_header:
        remarks.append(f"{printable(node.name)} has no line with the names of its columns: its first line names an image")
    twice = sorted({column for column in columns if columns.count(column) > 1 and column})
    if twice:
        raise DataError(f"{printable(node.path)}: the column {twice[0]!r} occurs more than once; rename one of them")

    def rows() -> Iterator[Row]:
        lines = _lines(text, separator, node)
        if has_header:
            next(lines)
        for number, (_, cells) in enumerate(lines, start=2 if has_header else 1):
            place = f"{printable(node.path)}, row {number}"
            if len(cells) > len(columns):
                raise DataError(
                    f"{place}: has {len(cells)} cells, but the table has {len(columns)} columns; put quotes around a text with a "
                    "separator in it"
                )
            if spaced:
                cells = [cell.strip() for cell in cells]
            if quoted:
                cells = [
                    cell.strip()[1:-1] if at in quoted and _is_quoted(cell.strip()) else cell for at, cell in enumerate(cells)
                ]
            yield Row(place, {column: cell or None for column, cell in zip(columns, cells, strict=False)})

    return Table(tuple(column for column in columns if column), rows, tuple(remarks))


def _lines(text: str, separator: str, node: Node) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every line that is not empty."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{printable(node.path)}, row {reader.line_num}: cannot be read as a table: {error}") from None


def _without_preamble(text: str) -> tuple[str, str | None, list[str]]:
    """Return a table's text without lines before its header, the separator that one of them declares, and what was skipped.

    Excel writes ``sep=;``, and programs write comments after a number sign.
    """
    remarks, declared = [], None
    while text:
        first, _, rest = text.partition("\n")
        line = first.strip()
        if declared is None and len(line) == 5 and line.lower().startswith("sep=") and line[4] in _SEPARATORS:
            declared = line[4]
        elif line.startswith("#") and not _separators_in(first) and _separators_in(_first_but_comments(rest)):
            remarks.append("a comment before the names of the columns was left out")
        else:
            break
        text = rest
    return text, declared, list(dict.fromkeys(remarks))


def _first_but_comments(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")


def _separators_in(line: str) -> int:
    return sum(line.count(separator) for separator in _SEPARATORS)


def _after_separators(lines: Iterator[tuple[int, list[str]]], *, skip: bool) -> bool:
    """Return whether each of the first lines has a space after every separator."""
    looked_at = [cells[1:] for _, cells in itertools.islice(lines, int(skip), _LINES_LOOKED_AT)]
    return bool(looked_at) and all(cells and all(cell.startswith(" ") for cell in cells) for cells in looked_at)


def _in_single_quotes(lines: Iterator[tuple[int, list[str]]], *, skip: bool) -> frozenset[int]:
    """Return the positions of the columns of which the first cells are all in single quotes, which CSV does not know."""
    looked_at = [cells for _, cells in itertools.islice(lines, int(skip), _LINES_LOOKED_AT)]
    width = min(map(len, looked_at), default=0)
    return frozenset(at for at in range(width) if all(_is_quoted(cells[at].strip()) for cells in looked_at))


def _is_quoted(cell: str) -> bool:
    return len(cell) > 2 and cell[0] == cell[-1] == "'"


def _names_image(cell: str) -> bool:
    ending = f".{cell.rpartition('.')[2].lower()}"
    return "." in cell and (ending in IMAGE_SUFFIXES or ending in FOREIGN_IMAGE_SUFFIXES)


def _separator_of(text: str) -> str:
    """Return the separator of the first line. Spreadsheet programs write semicolons in many countries."""
    first = text.lstrip("\n").partition("\n")[0]
    counts = {separator: first.count(separator) for separator in _SEPARATORS}
    return max(counts, key=lambda separator: counts[separator]) if any(counts.values()) else ","


def _text_of(node: Node) -> tuple[str, list[str]]:
    """Return a text file's contents, and sentences on its encoding if that was guessed."""
    data = _bytes_of(node)
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            try:
                return data.decode(encoding), []
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{printable(node.path)}: is not valid {encoding} text, although it is marked as such: {error.reason}"
                ) from None
    if (unmarked := _unmarked_utf16(data)) is not None:
        try:
            return data.decode(unmarked), [f"{printable(node.name)} has no mark of its encoding; it was read as {unmarked}"]
        except UnicodeDecodeError as error:
            raise DataError(f"{printable(node.path)}: looks like {unmarked} text, but is not valid: {error.reason}") from None
    try:
        return data.decode(), []
    except UnicodeDecodeError:
        pass
    lines = [line for line in data.splitlines() if not line.isascii()]
    decoded = decode_names(lines[:1000])
    try:
        text = data.decode(decoded.encoding)
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    return text, [f"{printable(node.name)} is not UTF-8 text; it was read as {decoded.encoding}"]


def _unmarked_utf16(data: bytes) -> str | None:
    """Return which UTF-16 a text without a byte order mark is in; None for any other text, which has no bytes that are 0."""
    head = data[:4096]
    for parity, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(head) >= 4 and head[parity::2].count(0) > _UTF16_SHARE * len(head) > head[1 - parity :: 2].count(0):
            return encoding
    return None


def _bytes_of(node: Node) -> bytes:
    try:
        return node.file.read(WHOLE_FILE)
    except ImageError as error:
        raise DataError(f"{printable(node.path)}: {error.message}") from None


# --------------------------------------------------------------------------------------------------------------- JSON lines


def open_json_lines(node: Node, reading: Reading) -> Table:
    """Open a file with one JSON object per line. Numbers are returned as written: ``1.0`` is not 1."""
    data = _bytes_of(node)
    columns: dict[str, None] = {}
    for number, line in enumerate(_objects(data, node)):
        columns.update(dict.fromkeys(line[2]))
        if number >= _LOOKED_AT:
            break
    if not columns:
        raise DataError(f"{printable(node.path)}: the table is empty")

    def rows() -> Iterator[Row]:
        for number, span, cells in _objects(data, node):
            place = f"{printable(node.path)}, line {number}"
            yield Row(place, {name: _cell(value, (name,), span, node) for name, value in cells.items()})

    return Table(tuple(columns), rows)


def _objects(data: bytes, node: Node) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
    """Yield (line number, (start, end) in the file, object) of each line that is not empty."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _unmarked_utf16(data):
        raise DataError(f"{printable(node.path)}: is UTF-16 text, and JSON lines are UTF-8; save it as UTF-8")
    start = 3 if data.startswith(codecs.BOM_UTF8) else 0
    number = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        if data[start:end].strip():
            yield number, (start, end), _object(data[start:end], f"{printable(node.path)}, line {number}")
        start = end + 1


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except RecursionError:
        raise DataError(f"{place}: is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{place}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be an object with the file and the label, found {type(value).__name__}")
    return value


def _cell(value: Any, path: tuple[str, ...], span: tuple[int, int], node: Node) -> Cell:
    if value is None or isinstance(value, str):
        if isinstance(value, str) and (start := _start_of_base64(value)) is not None:
            return JsonCell(InJson(node, span, path, start), None)
        return value or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value if item is not None]
    if isinstance(value, dict) and isinstance(value.get("bytes"), str):
        name = value.get("path")
        return JsonCell(InJson(node, span, (*path, "bytes"), 0), name if isinstance(name, str) else None)
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return str(value["path"])
    return json.dumps(value, ensure_ascii=False)


def _start_of_base64(text: str) -> int | None:
    """Return the position at which the base64 of an image begins in a text; None if the text is no image.

    A data URI has a prefix; plain base64 is recognised by the first bytes that it encodes.
    """
    if text.startswith("data:image/"):
        return text.find(",") + 1
    return 0 if len(text) > 100 and text.startswith(_IMAGES_IN_BASE64) else None


@dataclass(frozen=True)
class JsonCell:
    """An image in base64 in a JSON table."""

    file: SourceFile
    name: str | None


@dataclass(frozen=True, slots=True)
class InJson:
    """The bytes of an image in a line of a JSON table; the line is parsed again when they are read."""

    table: Node
    span: tuple[int, int]
    path: tuple[str, ...]
    skip: int  # characters before the base64

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        check_bytes((self.span[1] - self.span[0]) * 3 // 4, limits)
        value: Any = json.loads(_slice(self.table.file, self.span))
        for key in self.path:
            value = value[key]
        try:
            return base64.b64decode(str(value)[self.skip :], validate=True)
        except (binascii.Error, ValueError):
            raise ImageError("the image is not valid base64") from None

    def head(self) -> bytes:
        try:
            return self.read()[:HEAD_BYTES]
        except ImageError:
            return b""

    def state(self) -> str | None:
        state = self.table.file.state()
        return None if state is None else f"{state} {self.span[0]} {'.'.join(self.path)}"

    def __str__(self) -> str:
        return f"{self.table.file} at byte {self.span[0]:,}"


def _slice(file: SourceFile, span: Sequence[int]) -> bytes:
    if isinstance(file, LocalFile | StoredFile):
        with open(file.path, "rb") as stream:
            stream.seek(span[0])
            return stream.read(span[1] - span[0])
    return file.read(WHOLE_FILE)[span[0] : span[1]]
