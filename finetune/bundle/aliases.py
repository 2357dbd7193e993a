"""The aliases of a registered model: names of versions, and the journal of their moves. Torch-free.

``aliases.json`` maps aliases to versions. ``aliases.jsonl`` is the append-only journal of every move; rollback uses it, and it
keeps version numbers from being used twice.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from finetune.storage.files import write_json
from finetune.storage.journal import append_line, read_lines

LATEST = "latest"  # moves to every new version
CHAMPION = "champion"  # the version of the bare name; moves only by promotion

ALIASES = "aliases.json"
JOURNAL = "aliases.jsonl"  # append-only, every move of an alias; used by rollback, and to never reuse a version number
ALIAS_PATTERN = r"^[a-z][a-z0-9._-]{0,62}$"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AliasMove:
    """A move of an alias to a version."""

    alias: str
    version: str
    at: float  # Unix seconds
    by: str  # who moved it


def versions_in(folder: Path) -> list[str]:
    """Return the version numbers in a model's folder, in ascending order."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted((name for name in names if re.fullmatch(r"[1-9][0-9]*", name)), key=int)


def recorded_versions(folder: Path) -> set[str]:
    """Return the versions in the journal, including deleted ones."""
    return {version for _, version in moves_in(folder)}


def moves_in(folder: Path) -> list[tuple[str, str]]:
    """Return (alias, version) of every readable move in the journal, oldest first."""
    lines = [line for line in read_lines(folder / JOURNAL) if isinstance(line, dict)]
    moves = [(line.get("alias"), line.get("version")) for line in lines]
    return [(alias, version) for alias, version in moves if isinstance(alias, str) and is_version(version)]


def read_aliases(folder: Path) -> dict[str, str]:
    """Return the version of each alias. If ``aliases.json`` is damaged, they are read from the journal."""
    try:
        found = json.loads((folder / ALIASES).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if isinstance(found, dict) and all(is_version(version) for version in found.values()):
        return found
    log.warning("%s is damaged; the aliases are read from %s. The next promotion writes it anew", folder / ALIASES, JOURNAL)
    existing = set(versions_in(folder))
    return {alias: version for alias, version in moves_in(folder) if version in existing}


def is_version(value: object) -> TypeGuard[str]:
    """Return whether a value from a file is a version number."""
    return isinstance(value, str) and re.fullmatch(r"[1-9][0-9]*", value) is not None


def move_alias(folder: Path, alias: str, version: str, **audit: Any) -> None:
    """Point an alias at a version, and add the move to the journal.

    Args:
        audit: who moved it and why, for the journal.
    """
    write_json(folder / ALIASES, {**read_aliases(folder), alias: version})
    append_line(folder / JOURNAL, {"alias": alias, "version": version, "at": time.time(), **audit})
