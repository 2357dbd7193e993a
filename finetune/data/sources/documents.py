"""Find annotation files in JSON or XML where tools put them, and read each once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from finetune.data.dataset import Split
from finetune.data.layout import without_wrapping
from finetune.data.places.tree import Folder, Node, Place
from finetune.data.reading import Reading
from finetune.data.splits_by_name import split_meaning
from finetune.data.tables.rows import WHOLE_FILE
from finetune.errors import DataError, ImageError
from finetune.messages import printable

_ANNOTATION_FOLDERS = ("annotations", "annotation", "labels")


def json_files(place: Place) -> Iterator[Node]:
    """Yield the JSON files that may describe a place; see `annotation_files`."""
    return annotation_files(place, ".json")


def annotation_files(place: Place, suffix: str) -> Iterator[Node]:
    """Yield the files with this suffix that may describe a place: the given one, else those beside the images of each split."""
    if place.focus is not None:
        if place.focus.suffix == suffix:
            yield place.focus
        return
    whole = place.tree.root()
    root = without_wrapping(whole, Reading())
    for folder in [whole] if root is whole else [whole, root]:
        yield from _files_in(folder, suffix)
        for inner in folder.folders:
            if inner.name.casefold() in _ANNOTATION_FOLDERS or split_meaning(inner.name, {}) is not None:
                yield from _files_in(inner, suffix)


def _files_in(folder: Folder, suffix: str) -> Iterator[Node]:
    yield from (node for node in folder.files if node.suffix == suffix)


def mentions(node: Node, *words: bytes) -> bool:
    """Return whether a file's text contains all of these words, which is faster than parsing it."""
    try:
        text = bytes_of(node)
    except DataError:
        return False
    return all(word in text for word in words)


def read_document(node: Node) -> Any:
    """Return the JSON in a file; numbers are returned as texts.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(bytes_of(node))
    except RecursionError:
        raise DataError(f"{printable(node.path)}: is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{printable(node.path)}: is not JSON: {error}") from None


def bytes_of(node: Node) -> bytes:
    """Return the content of a file, which is read once.

    Raises:
        DataError: it cannot be read.
    """
    return _cached_bytes(_Key(node))


class _Key:
    """A key for a file in its present state."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.identity = (str(node.file), node.file.state())

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.identity == self.identity


@lru_cache(maxsize=2)
def _cached_bytes(key: _Key) -> bytes:
    try:
        return key.node.file.read(WHOLE_FILE)
    except ImageError as error:
        raise DataError(f"{printable(key.node.path)}: {error.message}") from None


def split_around(node: Node, reading: Reading) -> Split | None:
    """Return the split of a file by its name or that of a folder around it; None if they name none."""
    for part in (node.name.rpartition(".")[0], *reversed(node.path.split("/")[:-1])):
        meaning = split_meaning(part, reading.splits)
        if meaning is not None and meaning.split is not None and (meaning.certain or part.startswith("instances")):
            return meaning.split
    return None


def text_of(value: Any) -> str | None:
    """Return a JSON value as the text of a label; None for null, lists and objects."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, list | Mapping):
        return None
    return json.dumps(value)
