"""Detect labels that look like several in one cell, such as ``red|shirt``, when no separator was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# In this order. How often each part of a combination must occur on average, in how many labels: names rarely hold the first two,
# and often a comma of their own ("Paris, France").
_SEPARATORS = (("|", 1.2), (";", 1.2), (",", 1.5))
_LEAST_COMBINED = 2  # labels with the separator
_LEAST_SHARE = 0.3  # of all labels


def forgotten_separator(labels: Iterable[str]) -> tuple[str, list[str]] | None:
    """Return the separator that divides these class names into shared parts, and the names that contain it.

    Returns None if the names do not look like combinations of fewer parts.
    """
    names = sorted(set(labels))
    for separator, least in _SEPARATORS:
        combined = [name for name in names if len(_parts(name, separator)) > 1]
        if len(combined) < max(_LEAST_COMBINED, _LEAST_SHARE * len(names)):
            continue
        found = Counter(part for name in names for part in _parts(name, separator))
        if sum(found.values()) >= least * len(found):
            return separator, combined
    return None


def how_to_separate(separator: str) -> str:
    """Return the option that separates such labels, as it is written in a shell."""
    return f"--set 'data.label_separator={separator}'"


def _parts(name: str, separator: str) -> set[str]:
    return {part.strip() for part in name.split(separator)} - {""}
