"""Find the files that a table or an annotation file names, also if it was written on another machine."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from urllib.parse import parse_qs, unquote, urlsplit

from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Tree
from finetune.messages import plural

_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "data", "photos", "pictures", "files")
_UPLOAD_PREFIX = 9  # Label Studio puts eight hexadecimal digits and a dash before the name of an uploaded file


class Lookup:
    """Finds files by the names in tables: by the path, else by the end of the path, the file name, or the name without suffix."""

    def __init__(self, tree: Tree, folder: str) -> None:
        """Set the folder of the table, a path in the tree, which names are relative to."""
        self.tree, self.folder = tree, folder
        self._found_by: Counter[str] = Counter()
        self._names: dict[str, list[Node]] | None = None
        self._stems: dict[str, list[Node]] = {}

    def find(self, name: str, *, by_stem: bool = True, tried: bool = False) -> Node | None:
        """Return the file that `name` means; None if there is none, or if it is ambiguous.

        Args:
            by_stem: accept a name without its suffix too. (Then many numbers name files.)
            tried: the result is only used to find the column of files, so how the file was found is not recorded.
        """
        for path in self._paths(name):
            if (node := self.tree.find(path)) is not None:
                return node
        return self._by_end(name, by_stem, noted=by_stem and not tried)

    def say(self, notes: Notes) -> None:
        """Report how files were found if not by their paths alone."""
        for how, count in self._found_by.items():
            notes.say(f"{plural(count, 'file')} found by {how}, because there is no file at the given path")

    def _paths(self, name: str) -> Iterator[str]:
        """Yield paths from the tree's root at which the file may lie."""
        forward = name.replace("\\", "/") if "\\" in name else name
        above = f"{self.folder}/" if self.folder else ""
        for text in dict.fromkeys((name, forward, unquote(forward) if "%" in forward else forward)):
            inside = text.removeprefix("./")
            yield f"{above}{inside}" if not inside.startswith("/") else inside
            if above:
                yield inside
        if not forward.startswith("/"):
            around = self.folder.rpartition("/")[0]
            for place in dict.fromkeys((above, f"{around}/" if around else "")):
                yield from (f"{place}{folder}/{forward}" for folder in _IMAGE_FOLDERS)

    def _by_end(self, name: str, by_stem: bool, *, noted: bool) -> Node | None:
        """Return the only file whose path ends like `name`, or that has this name; else None."""
        if self._names is None:
            self._names = defaultdict(list)
            for node in self.tree.root().all_files():
                if node.is_image:
                    self._names[_key(node.name)].append(node)
                    self._stems.setdefault(_key(node.name.rpartition(".")[0] or node.name), []).append(node)
        parts = _parts(name)
        if not parts:
            return None
        candidates, how = self._called(parts[-1], self._names), "name alone"
        if len(candidates) > 1:  # the more of its path agrees, the better
            candidates = _agreeing(candidates, parts)
        if not candidates and len(parts[-1]) > _UPLOAD_PREFIX and parts[-1][_UPLOAD_PREFIX - 1] == "-":
            candidates, how = self._called(parts[-1][_UPLOAD_PREFIX:], self._names), "name without the prefix of an upload"
        if not candidates and by_stem:
            candidates, how = self._called(parts[-1], self._stems), "name without its ending"
        if len(candidates) != 1:
            return None
        if noted:
            self._found_by[how] += 1
        return candidates[0]

    def _called(self, name: str, index: Mapping[str, list[Node]]) -> list[Node]:
        """Return the files with a name, ignoring case; if one matches exactly, only that one."""
        found = index.get(_key(name), [])
        return [node for node in found if name in (node.name, node.name.rpartition(".")[0])] or found


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _parts(name: str) -> list[str]:
    """Return the parts of a path from any operating system, or of a URL that an annotation tool writes."""
    if "?d=" in name:  # Label Studio's address of a file on its own disk
        name = parse_qs(urlsplit(name).query).get("d", [name])[0]
    elif "://" in name:
        name = urlsplit(name).path
    name = unquote(name) if "%" in name else name
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return [part for part in path.parts if part not in ("/", "\\", ".", "..") and not part.endswith(":\\")]


def _agreeing(candidates: list[Node], parts: list[str]) -> list[Node]:
    """Return the candidates whose path has the longest common end with this one."""

    def agreement(node: Node) -> int:
        count = 0
        for mine, theirs in zip(reversed(node.path.split("/")), reversed(parts), strict=False):
            if _key(mine) != _key(theirs):
                break
            count += 1
        return count

    best = max(map(agreement, candidates))
    return [node for node in candidates if agreement(node) == best]
